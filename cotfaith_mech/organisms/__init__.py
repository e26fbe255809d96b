"""Organisms: tiny models whose reliance on the chain is known, because it was trained or written into them."""
