"""Many conversations at once: requests, their batch, and HTTP. Never imports training.

request, scheduler, runner, engine    a row of the batch, whose turn it is, its passes through the
                                      model, and the loop over all that in a thread of its own
metrics                               what Prometheus reads
settings, served                      limits; a loaded model with its engine and its names
messages, streams                     OpenAI's requests and answers; answers on their way
bodies, keys, refusals                what is not let in, and how it is told
api, chat_page, page/                 the HTTP application
ray_app                               the same in several processes, on one machine or many
"""
