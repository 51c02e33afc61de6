"""The smallest complete backend for kvq."""
