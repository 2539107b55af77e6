"""Figures of attar, each printed again by one command."""
