"""attar: make generative vision models small and fast."""

from attar.runtime.diffusers_integration import register as _register_with_diffusers

_register_with_diffusers()
