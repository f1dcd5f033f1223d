"""Files, images, tables, schemas: knows nothing of models."""
