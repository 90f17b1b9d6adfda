"""The life of a job: its record and states, its lease, its objects in storage, and the worker that runs it.

Owns every write to Valkey and to object storage; serves no HTTP and trains nothing itself. Where to look:

    accepted by   submission, admission, references, datasets, sources
    known by      record, ledger, ending, orders, sweeper, unfinished, erasure, rebuild
    rung for by   queue, outbox, registry
    run by        worker, run, tenure, lease, patience, stopping, preparation, resumption, scratch, gpus
    watched by    child, watch, verdict, stall, oom_kills, tail, relay
    kept by       conclusion, shipper, report, rollouts, lineage, archive, journal, layout, storage
    read by       service, event_pages, metrics, rollout_query, rollout_store, checkpoints, waiting, telemetry
    guarded by    keys, scrapers, sessions, ratelimit
    at the edges  settings, errors, logs, health
"""
