"""Several predictors behind one address: a queue and a router over Ray Serve. Nothing outside imports this."""
