"""`dflash-serve bench`: what DFlash earns, and what serving costs, measured on any OpenAI endpoint.

    tasks      prompts                          client     one streamed request, measured
    acceptance drafts accepted, by any server   measure    a load of so many conversations at once
    servers    servers started to be measured   run        stages: a server, its tasks, its concurrencies
    summary    samples -> rows (pure)           card       what the drafter's model card says
    overhead   what our front end costs         report     JSON, Markdown, HTML, pictures; terminal: view

Why a load generator of our own, and so small a one. We tried the two well-kept ones against a served pair:
`vllm bench serve` (0.29) sends MT-Bench's first turn alone, drops `usage.completion_tokens_details`, and finds
acceptance only at `<base>/metrics`, which an ingress before several replicas does not have. guidellm (0.8.1) holds
conversations, but keeps of each request an average of its inter-token latency, not the gaps that p99 needs, and keeps
neither accepted tokens nor vLLM's `metrics` beside `usage`; it also brings torch, datasets and sanic to a client.
"""
