"""ChatGLM-6B: the model, its tokenizer, its tuning and its generation.

Modules stand on floors, and imports go down only (tests/test_floors.py holds it):

    0   words and rules, no torch    errors  settings  run_settings  command_line  files  pictures
                                     prompts  growing_text  pieces  tokenizer
                                     strategies  scores
    1   numbers                      configuration  rotary  positions  prefix  cache
                                     kernels  quantization  tying  loss  fused
                                     packed  packed_attention  strict_files
    2   data, never a model          formats  sources  parts  corpus  records  shards
                                     workers  ray_workers  builder  showing  batches
    2'  text out of any model        sampling  plain_steps  row_adapters  supported  capture
                                     step_cache  paged_cache  prefill  prompt_graphs  steps
                                     batch_step  drafts  decoding  chat  terminal
    3   the model and its weights    model  weights
    4   changes to a model           tuning
    5   from and to a run's folders  sharding  saved  checkpoints  building
    6   training                     estimates  guards  optim  cluster  watchdog  training
                                     callbacks  trainer
    6'  scores of a model            evaluation
    6'' others' checkpoints          old_files  old_parts  old_base  conversion
    6''' many at once, over HTTP     serving

Floors of one number stand beside each other: none imports another. The text-out floor
stands under the model: it calls what it is handed and imports no model, so that
`ChatGLMForConditionalGeneration` can offer `chat` the way it offers transformers' `generate`.
Nothing is imported here: `import chatglm` costs nothing.
"""
