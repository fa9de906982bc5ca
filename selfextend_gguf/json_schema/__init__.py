"""JSON schemas (draft 2020-12) that texts are made to fit: patterns, schemas, and llguidance that forces them."""
