"use strict";
const at = (id) => document.getElementById(id);
const KEYS = {
  ArrowLeft: "left", 1: "left", ArrowRight: "right", 2: "right", ArrowDown: "tie", 3: "tie",
  s: "skip", u: "undo",
};
let pair = null, since = 0, busy = false, ended = false;

function remembered() {
  try { return localStorage.getItem("annotator"); } catch { return null; }
}
at("name").value = remembered() || "me";

async function ask(path, more = {}) {
  if (busy || ended) return;
  busy = true;
  enable(false);
  try {
    const reply = await fetch(path, {
      method: "POST", headers: { "X-Key": KEY, "Content-Type": "application/json" },
      body: JSON.stringify({ annotator: at("name").value, ...more }),
    });
    const found = await reply.json();
    if (!reply.ok) throw new Error(found.error);
    busy = false;
    show(found);
  } catch (error) {
    busy = false;
    pair = null;
    at("pair").hidden = true;
    say(error instanceof TypeError ? "The command has ended, or cannot be reached. Nothing that was said is lost." : error.message, true);
  }
}

function say(text, bad = false) {
  at("message").textContent = text;
  at("message").className = bad ? "bad" : "";
}

function enable(on) {
  for (const id of ["left", "right", "tie", "skip", "undo"]) at(id).disabled = !on;
}

function show(state) {
  if (state.ended) {
    ended = true;
    at("pair").hidden = true;
    at("finish").disabled = true;
    say("Finished. The terminal has the summary; this window can be closed.");
    return;
  }
  at("progress").textContent = `${state.pairs} of ${state.count} pairs judged, ${state.mine} by you`;
  const share = state.agreement && state.agreement.value;
  at("agreement").textContent = share === null ? "" :
    `Annotators agree on ${(100 * share).toFixed(0)} % of the pairs that two have judged` +
    (state.alpha === null ? "." : ` (Krippendorff's alpha ${state.alpha.toFixed(2)}).`);
  pair = state.pair;
  at("pair").hidden = pair === null;
  if (pair === null) {
    say(state.waiting ? "The model is writing …" : "That was the last pair. Thank you.");
    if (state.waiting) setTimeout(() => ask("/show"), 300);
    return;
  }
  say("");
  at("prompt").replaceChildren(...pair.prompt.map((m) => {
    const block = document.createElement("div"), role = document.createElement("span");
    role.className = "role";
    role.textContent = m.role;
    block.append(role, m.content);
    return block;
  }));
  ["left", "right"].forEach((id, k) => {
    const side = pair.sides[k], box = at(id);
    box.querySelector(".text").textContent = side.text;
    box.querySelector(".writer").textContent = side.writer || "";
    box.querySelector(".cut").hidden = side.finished;
    box.classList.remove("chosen");
  });
  enable(true);
  document.activeElement !== at("name") && document.activeElement.blur();
  since = performance.now();
}

function act(what) {
  if (what === "undo") return ask("/undo");
  if (pair === null || busy) return;
  if (what === "left" || what === "right") at(what).classList.add("chosen");
  ask("/judge", { pair: pair.id, choice: what, seconds: (performance.now() - since) / 1000 });
}

for (const id of ["left", "right", "tie", "skip", "undo"]) at(id).onclick = () => act(id);
at("finish").onclick = () => ask("/finish");
at("name").onchange = () => {
  at("name").value = at("name").value.trim() || "me";
  try { localStorage.setItem("annotator", at("name").value); } catch { /* private windows */ }
  at("name").blur();
  ask("/show");
};
document.addEventListener("keydown", (event) => {
  if (event.target === at("name") || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const what = KEYS[event.key];
  if (what) { event.preventDefault(); act(what); }
});
ask("/show");
