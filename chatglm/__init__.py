"""ChatGLM-6B: the model, its tokenizer, its tuning and its generation.

Modules stand on floors, and imports go down only (tests/test_floors.py holds it):

    0   words and rules, no torch    errors  settings  prompts  tokenizer  strategies
    1   numbers                      configuration  rotary  positions  prefix  cache
                                     quantization  loss
    2   text out of any model        sampling  decoding  chat
    3   the model                    model
    4   data, never a model          records  corpus  batches
    5   files of weights             weights
    6   training                     optim  training  callbacks
    6'  a terminal                   terminal

The text-out floor stands under the model: it calls what it is handed and imports no model, so
that `ChatGLMForConditionalGeneration` can offer `chat` the way it offers transformers' `generate`.
Nothing is imported here: `import chatglm` costs nothing.
"""
