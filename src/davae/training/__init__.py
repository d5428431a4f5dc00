"""One training loop on accelerate, and the stages that it trains."""
