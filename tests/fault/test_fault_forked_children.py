"""A process that is forked from a run can't end it, change its store or wait for its threads."""

import json

import pytest

from tests.forked import python

RUN = """
import json, os, sys, warnings
import torch
import offload

torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Sequential(*[torch.nn.Linear(512, 512) for _ in range(40)])
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
batch = torch.randn(4, 512)
losses = []

def step():
    loss = model(batch).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(loss.detach()).hex())

def in_child(work):
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    work()
    sys.exit(3)  # in good order, through all that runs at the end of the interpreter

def read():
    try:
        sum(float(p.detach().sum()) for p in model.parameters())
    except offload.errors.ForkedProcessError:
        sys.exit(4)

folder, put_off, forks = sys.argv[1], sys.argv[2] == "True", sys.argv[3] == "True"
with offload.attach(
    model, optimizer, budget="host=500MiB", nvme=folder, config={"step_in_forward": put_off}
) as engine:
    codes = []
    for _ in range(4):
        step()
        if forks:
            codes += [in_child(read) >> 8, in_child(lambda: None) >> 8]
print(json.dumps([losses, codes]))
"""


@pytest.mark.parametrize("put_off", [False, True])
def test_children_end_and_the_run_goes_on(tmp_path, put_off):
    def run(name, *, forks):
        done = python("-c", RUN, tmp_path / name, put_off, forks)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    losses, codes = run("forked", forks=True)
    assert losses == run("calm", forks=False)[0]
    # Weights that are mapped can be read in a child; a step that is put off can't be made there.
    reading, ending = codes[0::2], codes[1::2]
    assert reading == ([3, 4, 4, 4] if put_off else [3, 3, 3, 3])
    assert ending == [3, 3, 3, 3]
