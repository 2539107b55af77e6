"""What is taken when nothing is said. Light, so that the command line can show it before it loads anything."""

DEFAULT_RECIPE = "attar"
