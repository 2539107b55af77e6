"""What a compression will do before anyone waits for it.

`plan` tells it from the architecture alone, for any hardware; `dry_run` measures it here, with the model loaded.
"""
