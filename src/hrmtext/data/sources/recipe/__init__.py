"""The sources of the published recipe, a file a source or close family; `catalog` lists them."""
