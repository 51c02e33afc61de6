"""Quality of caches on a text, against full precision on the same tokens; `kvq eval` is its command line."""
