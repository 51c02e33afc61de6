"""The backend template for kvq."""
