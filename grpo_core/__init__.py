"""GRPO training as a library: the job spec, rewards, data sets, records, and the loop that runs them.

Owns everything a run means; knows nothing of HTTP, queues or object storage. Torch comes only with the engines
themselves and with `checkpoints`, `tensor_tree`, `selftest`, `probes` and `stock`. Where to look:

    asked for by     spec, estimates
    made from        datasets, prompts, models, hub, rewards
    trained by       training, engines, gpus, micro_batch, activations, lifetime
    written down by  step_recorder, records, runfolder, strict_json, trackers, model_card
    gone on from     checkpoints, saved_run, tensor_tree
    judged by        guards, audits, evaluation, held_out, comparison, ends, selftest, probes, stock
    failing by       errors, failures
    shown by         report_page
"""

__version__ = "0.1.0"
