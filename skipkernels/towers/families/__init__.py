"""Model families: one module for each, with its embeddings, blocks and head."""
