"""`python -m bert_fast.cli`, which torchrun can start: `torchrun --nproc_per_node 2 -m bert_fast.cli finetune ...`."""

from bert_fast.cli import app

app(prog_name="bert-fast")
