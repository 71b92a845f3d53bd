"""Compose a round by hand and look at what it does. Runs anywhere: the models are exact toys.

python examples/compose_a_step.py
"""

from specdec import Sampling, build_step, controllers, drafters, init_state, output_tokens, policies
from specdec.metrics import summarize
from specdec.models.tabular import tabular, tabular_draft

target = tabular(vocab_size=8, seed=1, sharpness=2.0)
draft = tabular_draft(target, agreement=0.7)

parts = {"model": target, "drafter": drafters.draft_model(draft), "controller": controllers.aimd(3)}
step = build_step(policy=policies.block(), sampling=Sampling(temperature=1.0), eos_ids=[7], **parts)
state = init_state([[1, 2, 3], [4, 5]], max_new_tokens=24, seed=0, **parts)

while not bool(state.done.all()):
    state, info = step(state)
    for row in range(2):
        if info.running[row]:
            drafted = int(info.proposal.valid[row].sum()) - 1
            kept = int(info.verdict.num_accepted[row])
            print(
                f"row {row}: drafted {drafted}, kept {kept}, wrote {[t for t in info.emitted[row].tolist() if t >= 0]}"
            )

print(output_tokens(state))
print({name: value for name, value in summarize(state.metrics).items() if name != "hist"})
