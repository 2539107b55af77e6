from attar.cli import main

main()
