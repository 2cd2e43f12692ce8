"""What bert_fast is measured on, and by what."""
