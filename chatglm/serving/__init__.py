"""Many conversations at once: requests, their batch, and HTTP. Never imports training.

    request     what is asked for, and a row of the batch
    scheduler   whose turn it is, and who gets the pages of the cache
    runner      the rows' passes through the model
    engine      the loop over both, in a thread of its own
    messages    OpenAI's requests and answers to and from ours
    metrics     what Prometheus reads
    streams     answers on their way to a client
    api         the HTTP application
    ray_app     the same application in several processes, on one machine or many
"""
