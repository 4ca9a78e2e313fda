"""The report in a real browser: the script runs, and hostile text stays text.

A copy of the page gets a probe in front of our script that notes errors, alerts and policy
violations in an attribute, which `--dump-dom` prints. The probe is allowed by adding its hash to
the policy of the copy; nothing else about the page is changed.
"""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from synthetic_microscope import write_microscope
from synthetic_runs import HOSTILE

from untwine.report import build_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=4000",
    "--dump-dom",
]
NASTY = (
    HOSTILE
    + "\"' onmouseover=alert(2) x='\u202eturned\u200f \u05e9\u05dc\u05d5\u05dd "
    + "javascript:alert(3) {{ 7 * 7 }} "
    + "w" * 400
)
PROBE = """
const keep = (key, value) => document.documentElement.setAttribute("data-" + key, value);
const note = (what) => keep("fault", what);
addEventListener("error", (event) => note("error: " + event.message), true);
addEventListener("securitypolicyviolation", (event) => note("policy: " + event.violatedDirective));
window.alert = () => note("alert");
console.error = (...words) => note("console: " + words.join(" "));
addEventListener("load", () => setTimeout(() => {
  const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", { key }));
  press("j");
  press("j");
  press("k");
  const plot = document.querySelector(".plot");
  plot?.dispatchEvent(new KeyboardEvent("keydown", { key: "End" }));
  const search = document.querySelector("input[type=search]");
  const count = (selector) => document.querySelectorAll(selector).length;
  const before = count(".list li");
  if (search) {
    const entries = [...document.querySelectorAll(".list button")];
    keep("open", entries.findIndex((entry) => entry.getAttribute("aria-current") === "true"));
    search.value = "no such text";
    search.dispatchEvent(new Event("input"));
    keep("list", before + " to " + count(".list li"));
    search.value = "";
    search.dispatchEvent(new Event("input"));
  }
  document.getElementById("theme").click();
}, 300));
"""
LOOK = """
addEventListener("load", () => setTimeout(() => {
  const shown = (selector) => [...document.querySelectorAll(selector)];
  const tips = [];
  for (const area of shown("#microscope .plots [tabindex]")) {
    for (const key of ["ArrowRight", "ArrowRight", "ArrowDown"]) {
      area.dispatchEvent(new KeyboardEvent("keydown", { key, cancelable: true }));
    }
    const tip = area.parentElement.querySelector(".tip");
    tips.push(tip.hidden ? "" : tip.textContent);
  }
  keep("tips", tips.filter(Boolean).length + " of " + tips.length);
  keep("heat", shown("canvas.heat").filter((canvas) => {
    const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    return new Set(new Uint32Array(pixels.buffer)).size > 20;
  }).length);
  const slide = document.querySelector(".slide input");
  const map = slide.closest("figure");
  const place = () => map.querySelector(".spot").getAttribute("transform");
  const before = place();
  slide.value = 0;
  slide.dispatchEvent(new Event("input"));
  keep("moved", before !== place());
  shown("#microscope details").forEach((part) => { part.open = true; });
  const looks = [];
  for (let i = 0; i < 4; i += 1) {
    const chosen = document.querySelector("input[name=shade]:checked");
    const classes = shown(".strip .chip").map((chip) => chip.className.split(" ")[1]);
    looks.push(chosen.value + " " + new Set(classes.filter(Boolean)).size);
    document.dispatchEvent(new KeyboardEvent("keydown", { key: "c" }));
  }
  keep("looks", looks.join(", "));
  // Chromium's windows are never narrower than 500; a narrow body stands for a phone's screen.
  if (window.innerWidth < 600) document.body.style.width = "390px";
  const room = Math.round(document.body.getBoundingClientRect().width);
  keep("room", room);
  keep("wide", document.body.scrollWidth > room);
  const out = shown("main *").filter((node) => node.getBoundingClientRect().right > room + 1
    && !node.closest(".scroll, .sr, nav, svg, pre, .tip, select"));
  keep("out", out.map((node) => node.className || node.tagName).join(" "));
  const bidi = shown("#microscope code, #microscope td, #microscope th, .command, .chip, .small");
  keep("bidi", bidi.filter((node) => getComputedStyle(node).unicodeBidi === "normal"
    && getComputedStyle(node).display === "inline").length);
}, 900));
"""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome is installed"),
]


def open_page(
    report: Path, scratch: Path, probe: str = PROBE, size: str = "1200,900"
) -> tuple[str, str]:
    """The document after the script ran, and what the browser logged."""
    digest = base64.b64encode(hashlib.sha256(probe.encode()).digest()).decode()
    html = report.read_text("utf-8")
    html = html.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
    html = html.replace("<style>", f"<script>{probe}</script><style>", 1)
    copy = scratch / "probed.html"
    copy.write_text(html, "utf-8")
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER,
            *FLAGS,
            f"--window-size={size}",
            f"--user-data-dir={scratch / 'profile'}",
            copy.as_uri(),
        ],
        capture_output=True,
        timeout=120,
        check=True,
    )
    return done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")


def root_attributes(dom: str) -> dict[str, str]:
    match = re.search(r"<html([^>]*)>", dom)
    assert match, dom[:500]
    return dict(re.findall(r'([\w-]+)="([^"]*)"', match.group(1)))


def without_scripts(dom: str) -> str:
    return re.sub(r"<script\b.*?</script>", "", dom, flags=re.DOTALL)


def check(dom: str, log: str) -> dict[str, str]:
    root = root_attributes(dom)
    assert root["data-ready"] == "yes"
    assert "data-fault" not in root, root["data-fault"]
    assert root["data-theme"] == "light"  # one press of the button after "auto"
    assert "CONSOLE" not in log, [line for line in log.splitlines() if "CONSOLE" in line]
    return root


def test_two_hostile_runs(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    runs = [
        make_run("a", text=HOSTILE, iterations=30),
        make_run("b", text=HOSTILE, iterations=30, seed=1),
    ]
    dom, log = open_page(build_report(runs, tmp_path / "r.html"), tmp_path)
    root = check(dom, log)
    body = without_scripts(dom)
    assert not re.search(r"<(img|iframe|b>&amp;)", body)
    assert not re.search(r"<[^>]*\sonerror\s*=\s*[^>]*>", re.sub(r'"[^"]*"', '""', body))
    assert "&lt;img src=x onerror=alert(1)&gt;" in body
    assert root["data-open"] == "1"  # j, j, k leaves the second episode open
    assert root["data-list"] == "96 to 0"
    assert body.count('class="curve"') > 40
    assert '<section class="step' in body
    assert "<b>iteration 28</b>" in body  # the last evaluation, in the read-out of the first chart


@pytest.mark.parametrize("size", ["1200,900", "500,844"])
def test_a_hostile_microscope(tmp_path: Path, make_run: Callable[..., Path], size: str) -> None:
    """Every plot draws and reads out, the colours switch, nothing runs, and nothing is pushed out
    of a screen as small as a phone's."""
    run = write_microscope(make_run(text=NASTY, iterations=11), NASTY)
    report = build_report([run], tmp_path / "r.html")
    dom, log = open_page(report, tmp_path, PROBE + LOOK, size)
    root = check(dom, log)
    body = without_scripts(dom)
    assert not re.search(r"<(img|iframe|b>&amp;)", body)
    assert not re.search(r"<[^>]*\son\w+\s*=\s*[^>]*>", re.sub(r'"[^"]*"', '""', body))
    assert "&lt;img src=x onerror=alert(1)&gt;" in body
    assert "{{ 7 * 7 }}" in body
    assert "[U+202E]turned[U+200F]" in body
    assert root["data-tips"] == "11 of 11"  # 2 of truth, 3 of coupling, 2 of cosines, 4 by layer
    assert root["data-heat"] == "1"
    assert root["data-moved"] == "true"
    looks = dict(look.split() for look in root["data-looks"].split(", "))
    assert list(looks) == ["truth", "advantage", "push", "labels"]
    assert all(int(count) > 0 for count in looks.values()), looks
    assert root["data-room"] == ("390" if size == "500,844" else root["data-room"])
    assert root["data-wide"] == "false", root["data-out"]
    assert root["data-out"] == ""
    assert root["data-bidi"] == "0"


def test_an_empty_run(tmp_path: Path) -> None:
    run = tmp_path / "empty"
    run.mkdir()
    (run / "metrics.jsonl").touch()
    dom, log = open_page(build_report([run], tmp_path / "r.html"), tmp_path)
    check(dom, log)
    assert "there are no curves" in dom
    assert "No episodes were recorded" in dom


def test_the_policy_stops_a_foreign_script(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    """Were something hostile to get into the markup after all, it would not run."""
    report = build_report([make_run(iterations=2)], tmp_path / "r.html")
    html = report.read_text("utf-8")
    report.write_text(html.replace("<main", '<img src="x" onerror="alert(1)"><main', 1), "utf-8")
    dom, _ = open_page(report, tmp_path)
    fault = root_attributes(dom).get("data-fault", "")
    assert fault.startswith("policy: ") or fault.startswith("error: ")
    assert "alert" not in fault
