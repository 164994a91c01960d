"""Does a mixture of LoRA experts beat one LoRA of as many trainable parameters? `make effect` measures it.

tasks.py and general.py make the data, methods.py the adapters that are compared, plan.py the runs; run.py trains and
scores one of them, rows.py keeps the results; bootstrap.py, table.py and plot.py make RESULTS.md from the rows.
"""
