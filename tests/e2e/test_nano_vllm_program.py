"""A program that was written for nano-vllm runs unchanged, and ends without llm.close()."""

import re
import shutil
from pathlib import Path

from nanovllm import bundled_model_path
from tests.support.programs import run_python
from tests.support.source_tree import ROOT

PROGRAM = Path(__file__).with_name("nano_vllm_program.py")
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"
PRINTED = (
    r"(Prompt: '<user>.+<assistant>'\nCompletion: '.+'\n){2}Total: \d+tok, Time: [\d.]+s, Throughput: [\d.]+tok/s\n"
)
PROGRESS = r"(Generating: .* tok/s\n){2}"  # of the calls without use_tqdm=False


def test_a_program_in_the_style_of_nano_vllm_runs(tmp_path: Path) -> None:
    model = shutil.copytree(bundled_model_path(), tmp_path / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    environment = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    result = run_python("-W", "error::ResourceWarning", PROGRAM, model, **environment)
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(PRINTED, result.stdout), result.stdout
    assert re.fullmatch(PROGRESS, result.stderr), "no warning, and nothing that was left open"
