"""attar: make generative vision models small and fast."""
