"""The backends that ship with kvq; each enters through the entry-point group `kvq.backends`, like a third party's."""
