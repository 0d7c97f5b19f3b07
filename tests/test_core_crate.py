"""The crate as a Rust programmer meets it: a dependency by path, with no Python in sight."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

MANIFEST = """
[package]
name = "outside"
version = "0.0.0"
edition = "2024"

[dependencies]
nest-rs = {{ path = {path!r} }}

[workspace]
"""

PROGRAM = """
use nest_rs::{KMeans, Matrix, silhouette, silhouette::Distance};

fn main() -> Result<(), nest_rs::Error> {
    let x: Vec<f32> = (0..60).map(|i| (i % 3 * 100 + i) as f32).collect();
    let x = Matrix::new(&x, 60, 1)?;
    let fit = KMeans::new(3).n_init(3).fit(&x)?;
    let score = silhouette(&x, &fit.labels, Distance::Euclidean)?.mean;
    println!("{} clusters, silhouette {score:.2}", fit.n_used);
    Ok(())
}
"""


@pytest.mark.skipif(shutil.which("cargo") is None, reason="no Rust toolchain")
def test_a_program_outside_the_repository_needs_no_python(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "Cargo.toml").write_text(MANIFEST.format(path=str(ROOT)).replace("'", '"'))
    (tmp_path / "src" / "main.rs").write_text(PROGRAM)
    # The versions this repository was tested with; the dependencies are built once.
    shutil.copy(ROOT / "Cargo.lock", tmp_path / "Cargo.lock")
    env = {
        **os.environ,
        "CARGO_TARGET_DIR": str(ROOT / "target" / "outside"),
        "PYO3_PYTHON": "/nonexistent/python",
    }
    env.pop("VIRTUAL_ENV", None)
    done = subprocess.run(
        ["cargo", "run", "--quiet"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "3 clusters, silhouette 0.77\n"
    tree = subprocess.run(["cargo", "tree", "--offline"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "pyo3" not in tree.stdout
    assert "rayon" in tree.stdout
