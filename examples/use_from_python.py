"""Use a trained model from Python; run `make quickstart` first. The same lines are in docs/inference.md."""

import torch

from looplm import checkpoint
from looplm.encoding import encode
from looplm.inference import GenerationConfig, Generator
from looplm.megatron import process_groups
from looplm.model.exit_gate import exit_log_probs

groups = process_groups.start(seed=0)
opened = checkpoint.open_model("runs/quickstart/gate", groups)
ids_BS = torch.tensor([encode(opened.tokenizer, "import os", opened.about.begin_id)])  # with BOS if texts begin so
with torch.no_grad():
    output = opened.model(ids_BS, num_loops=6)  # output.hidden: 6 tensors [S, B, D]
trained = opened.model.model_config.num_loops
p_RSB = exit_log_probs(output.gate_logit_RSB[:trained]).exp()  # where each token would leave

generator = Generator.of(opened)
(answer,) = generator.generate(["import os"], GenerationConfig(temperature=0.0, exit_threshold=0.5, max_new_tokens=8))
print(answer.text, answer.depths)
process_groups.stop()
