"use strict";
// Everything that comes from a user or the server is shown through textContent, never as markup.

const HUES = 8; // classes of kinds in page.css; after the last comes the first again
const CLASSES = { none: "no fact", ok: "supported", hallu: "hallucinated" };
const KEY = "fgaif-key";
const TRIES = 5; // of one request while the server says when to try again
const EXAMPLE = {
  image:
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAEgAAABIBAMAAACnw650AAAAD1BMVEX08uLoxisipi+DYB+bJKfDhsqmAAABDUlEQVR42u2VUWoDIRCGPycewN5AcoJAL+D9IZATLN5ge4GYPphVt+tsliaUBnYeVOTj/8dxRNhjjz3eNwyAeBjuG5+cF5DcGY4T0wkBPEzjoWtnQWBAvACcUJQ8A6SI14QQhASQEE0IASKUUYF8WfuDCmW3Mml2D+PvIXmIS1OfeF2xay5Yg1I2EhJcVKXIEcQTQfGzkHLHJYDLacMFX9XEU6T0+PkVb6Zm2b8W5+pOCH3IzKQUJQeuutkuZH5k1YUcVKkAoQNlEeNWlVxbBtsrgtRs3IqSm1U0lKGFmmOpUnIbp+X4NaVjl/1Exj42P6kwm554nLbfLr9QCovFdiXbHt4qPWwqM/6XX+obdRso8JJKALIAAAAASUVORK5CYII=",
  text: "There is a large yellow house. There is a small purple triangle, from the house the triangle is left. There is a large red star, from the triangle the star is above.",
  text2: "There is a large yellow house. There is a large purple triangle, from the house the triangle is right. There is a large green ring, from the house the ring is above.",
};

const $ = (id) => document.getElementById(id);
const title = (word) => word[0].toUpperCase() + word.slice(1).replaceAll("_", " ");
const percent = (p) => `${Math.round(100 * p)}%`;
const likely = (probs) => Object.keys(CLASSES).reduce((a, b) => (probs[b] > probs[a] ? b : a));
const comparing = () => !$("second").hidden;

let kinds = []; // of the served models, in order
let colours = {}; // those of kinds that the server names
let image = null; // data URI
let shown = null; // the server's last answer to a score request
let rule = "that of the models' training"; // how the server makes rewards, in words
let busy = false;
let again = start; // what to do once there is a key

function number(value, digits = 2, signed = false) {
  const text = Math.abs(value).toFixed(digits);
  if (Number(text) === 0) return text;
  return (value < 0 ? "−" : signed ? "+" : "") + text;
}

function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children); // strings become text nodes
  return element;
}

/** Give an element the colour and the line of a kind. */
function inked(element, kind) {
  element.classList.add(`kind-${kinds.indexOf(kind) % HUES}`);
  if (kind in colours) element.style.setProperty("--hue", colours[kind]);
  return element;
}

const chip = (kind, text = "") => inked(el("span", { class: "chip", "aria-hidden": "true" }, kind[0].toUpperCase() + text), kind);

// ---- messages -------------------------------------------------------------------------------

function fieldError(name, message) {
  $(`${name}-error`).textContent = message;
  if (message) $(name).setAttribute("aria-invalid", "true");
  else $(name).removeAttribute("aria-invalid");
}

function clearMessages() {
  for (const name of ["key", "image", "prompt", "text", "text2"]) fieldError(name, "");
  $("alert").textContent = "";
  $("status").textContent = "";
}

function fieldOf(path) {
  const [root, ...rest] = path.split(".");
  if (root === "text" && comparing() && rest.at(-1) === "1") return "text2";
  return ["image", "prompt", "text"].includes(root) ? root : null;
}

const failure = (details) => Object.assign(new Error(details.message), details);

function report(error) {
  if (error.status === undefined) throw error; // a bug of this page, not an answer
  // A request that is too large is so because of its image.
  const field = fieldOf(error.field ?? (error.status === 413 ? "image" : ""));
  if (error.status === 401) {
    const refused = sessionStorage.getItem(KEY) !== null;
    sessionStorage.removeItem(KEY);
    $("key-box").hidden = false;
    fieldError("key", refused ? "The server refused this key." : "The server asks for an API key.");
    $("key").focus();
  } else if (field) {
    fieldError(field, error.message);
    $(field).focus();
  } else {
    $("alert").textContent = error.message;
  }
}

// ---- server ---------------------------------------------------------------------------------

async function call(path, body) {
  const headers = { Accept: "application/json" };
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
  } catch {
    throw failure({ status: 0, message: "The server cannot be reached. Check that it is running, then try again." });
  }
  const data = await answer.json().catch(() => null);
  if (answer.ok && data) return data;
  throw failure({
    message: `The server answered with status ${answer.status}. Try again later.`,
    ...data?.error,
    status: answer.status,
    wait: Number(answer.headers.get("Retry-After")),
  });
}

async function pause(seconds) {
  $("status").textContent = `The server is busy. Trying again in ${seconds} seconds.`;
  $("wait").hidden = false;
  for (let left = seconds; left > 0 && !$("wait").hidden; left--) {
    $("countdown").textContent = `Trying again in ${left} s`;
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
  const stopped = $("wait").hidden;
  $("wait").hidden = true;
  return !stopped;
}

async function patiently(work) {
  for (let tries = 1; ; tries++) {
    try {
      return await work();
    } catch (error) {
      if (!error.wait || tries === TRIES) throw error;
      if (!(await pause(Math.min(Math.ceil(error.wait), 120)))) throw error;
    }
  }
}

async function act(doing, button, work) {
  if (busy) return;
  const name = button.textContent;
  clearMessages();
  busy = true;
  again = () => act(doing, button, work);
  button.textContent = $("status").textContent = doing;
  button.setAttribute("aria-disabled", "true");
  $("results").setAttribute("aria-busy", "true");
  try {
    await patiently(work);
  } catch (error) {
    $("status").textContent = "";
    report(error);
  } finally {
    busy = false;
    button.textContent = name;
    button.removeAttribute("aria-disabled");
    $("results").removeAttribute("aria-busy");
  }
}

/** The shape of the rewards in words; keys are those of ppo.shape. */
function ruleOf(shape) {
  const value = (key) => number(shape[key], 2, true);
  const each = `supported ${value("value_ok")}, hallucinated ${value("value_hallu")}, no fact ${value("value_none")}`;
  const parts = [
    `${each} per sub-sentence and kind, ${shape.values === "hard" ? "of the likeliest class" : "by probability"}`,
    `times ${Object.entries(shape.weights).map(([kind, weight]) => `${weight} (${kind})`).join(", ")}`,
  ];
  if (shape.repeat_penalty) parts.push(`${number(-shape.repeat_penalty)} for a repeated or unreadable one`);
  if (shape.order?.length) parts.push(`in the order ${shape.order.join(", ")}`);
  return `${parts.join(", ")}; without what PPO adds of a whole run and response`;
}

async function start() {
  try {
    const { models, generates } = await call("v1/models");
    if (models[0]?.shape?.weights) rule = ruleOf(models[0].shape);
    $("model").textContent = models.map((model) => `${model.name} ${model.version}`).join(", ");
    kinds = models[0].kinds;
    colours = models[0].colours ?? {};
    paintMeanings(models[0].meanings ?? {});
    for (const button of document.querySelectorAll(".generate")) button.hidden = !generates;
  } catch (error) {
    report(error);
  }
}

function takeKey() {
  const key = $("key").value.trim();
  // Other characters cannot stand in a header.
  if (!/^[\x21-\x7e]+$/.test(key)) {
    fieldError("key", key ? "A key has only plain letters, digits and signs." : "Enter the key.");
    $("key").focus();
    return false;
  }
  sessionStorage.setItem(KEY, key);
  $("key").value = "";
  $("key-box").hidden = true;
  return true;
}

async function useKey() {
  if (!takeKey()) return;
  clearMessages();
  (again === start ? $("image") : $("score")).focus();
  await again();
  if (again !== start && sessionStorage.getItem(KEY)) await start();
}

/** True if every named field is filled; the first that is not gets the focus. */
function complete(names) {
  clearMessages();
  const wanted = { image: "Choose an image.", text: "Enter a text.", text2: "Enter the text to compare with." };
  const missing = names.filter((name) => !(name === "image" ? image : $(name).value.trim()));
  for (const name of missing) fieldError(name, wanted[name]);
  if (missing.length) $(missing[0]).focus();
  return !missing.length;
}

function score() {
  if (!$("key-box").hidden && $("key").value && !takeKey()) return;
  const names = comparing() ? ["text", "text2"] : ["text"];
  if (busy || !complete(["image", ...names])) return;
  const texts = names.map((name) => $(name).value);
  const body = { text: comparing() ? texts : texts[0], prompt: $("prompt").value, image, facts: true };
  act("Scoring…", $("score"), async () => {
    show(await call("v1/score", body));
    $("status").textContent = summary();
  });
}

function generate(button) {
  if (busy || !complete(["image"])) return;
  act("Generating…", button, async () => {
    const { text } = await call("v1/generate", { image, prompt: $("prompt").value });
    $(button.dataset.into).value = text;
    $("status").textContent = "Text generated.";
  });
}

// ---- image ----------------------------------------------------------------------------------

function setImage(data, name) {
  image = data;
  fieldError("image", "");
  $("preview").src = data;
  $("image-name").textContent = name;
}

function takeFile(file) {
  if (!file) return;
  if (!file.type.startsWith("image/")) {
    fieldError("image", `${file.name} is not an image.`);
    return;
  }
  const reader = new FileReader();
  reader.onload = () => setImage(reader.result, file.name);
  reader.onerror = () => fieldError("image", `${file.name} cannot be read.`);
  reader.readAsDataURL(file);
}

// ---- result ---------------------------------------------------------------------------------

function paintMeanings(meanings) {
  const parts = kinds.map((kind) => [
    el("dt", {}, inked(el("span", { class: "sample flagged" }, title(kind)), kind)),
    el("dd", {}, meanings[kind] ?? ""),
  ]);
  $("meanings").replaceChildren(...parts.flat());
}

const chosen = () => document.querySelector("#kinds :checked").value;
const flags = (segment, among) => among.filter((kind) => likely(segment.kinds[kind]) === "hallu");
const flagged = (result) => result.segments.filter((segment) => flags(segment, kinds).length).length;
const names = () => (shown.results.length > 1 ? ["Before", "After"] : ["Text"]);

function summary() {
  const said = shown.results.map((result, i) => `${names()[i]}: ${flagged(result)} of ${result.segments.length} sub-sentences flagged.`);
  return `Scored. ${said.join(" ")}`;
}

function show(answer) {
  const before = document.querySelector("#kinds :checked")?.value;
  shown = answer;
  kinds = Object.keys(answer.results[0].rewards);
  const choices = ["any", ...kinds];
  const kept = choices.includes(before) ? before : "any";
  $("kinds").replaceChildren($("kinds").firstElementChild);
  for (const kind of choices) {
    const radio = el("input", { type: "radio", name: "kind", value: kind });
    radio.checked = kind === kept;
    const word = el("span", { class: "word" }, title(kind));
    const any = kind === "any";
    const label = el("label", any ? { class: kind } : {}, radio, ...(any ? [] : [chip(kind)]), word);
    $("kinds").append(any ? label : inked(label, kind));
  }
  $("empty").hidden = true;
  $("filled").hidden = false;
  paint();
  paintTotals();
  const { model, timing_ms: timing } = answer;
  $("made").textContent = `Scored by ${model.name} ${model.version} in ${number(timing.total, 0)} ms. Reward: ${rule}. A probability is the model's belief, not a proof.`;
  if ($("results").getBoundingClientRect().top > innerHeight / 2) $("results").scrollIntoView();
}

function paint() {
  hideTip();
  $("texts").replaceChildren(
    ...shown.results.map((result, i) => {
      const count = `${result.segments.length} sub-sentence${result.segments.length === 1 ? "" : "s"}`;
      const heading = el("h2", { id: `text-${i}` }, names()[i], el("span", {}, count));
      return el("article", { class: "text" }, heading, readable(result, i));
    }),
  );
}

function readable(result, i) {
  const box = el("div", { class: "read", role: "listbox", "aria-labelledby": `text-${i}`, "aria-orientation": "horizontal" });
  const points = Array.from(result.text); // spans count code points, not UTF-16 units
  let end = 0;
  result.segments.forEach((segment, j) => {
    const whole = points.slice(segment.start, segment.end).join("");
    const text = whole.trim();
    const at = whole.indexOf(text);
    box.append(points.slice(end, segment.start).join("") + whole.slice(0, at), piece(segment, text, j), whole.slice(at + text.length));
    end = segment.end;
  });
  box.append(points.slice(end).join(""));
  return box;
}

function piece(segment, text, j) {
  const among = chosen() === "any" ? kinds : [chosen()];
  const wrong = flags(segment, among);
  const hallu = (kind) => segment.kinds[kind].hallu;
  const worst = (wrong.length ? wrong : among).reduce((a, b) => (hallu(b) > hallu(a) ? b : a));
  const none = among.every((kind) => likely(segment.kinds[kind]) === "none");
  const said = among.map((kind) => `${kind} ${CLASSES[likely(segment.kinds[kind])]}, hallucination ${percent(hallu(kind))}`);
  const reward = number(among.length === 1 ? segment.kinds[among[0]].reward : segment.reward, 2, true);
  const element = el("span", {
    class: `segment${wrong.length ? " flagged" : none ? " none" : ""}`,
    role: "option",
    tabindex: j === 0 ? "0" : "-1",
    "aria-label": `${text} (${said.join("; ")}; reward ${reward})`,
    "aria-describedby": "tip",
  });
  inked(element, worst);
  element.style.setProperty("--p", hallu(worst));
  element.segment = segment;
  // The last word and the chips stay on one line.
  const cut = wrong.length && text.length - text.search(/\S+$/) <= 24 ? text.search(/\S+$/) : text.length;
  const chips = wrong.map((kind) => chip(kind, ` ${percent(hallu(kind))}`));
  element.append(text.slice(0, cut), el("span", { class: "whole", "data-reward": reward }, text.slice(cut), ...chips));
  return element;
}

function paintTotals() {
  const row = (name, cells) => el("tr", {}, el("th", { scope: "row" }, name), ...cells);
  const cell = (text) => el("td", {}, text);
  const head = (name, ...before) => el("th", { scope: "col" }, ...before, el("span", before.length ? { class: "word" } : {}, name));
  const costs = shown.results.some((result) => result.penalty);
  const heads = [head(""), head("Flagged"), ...kinds.map((kind) => head(title(kind), chip(kind))), ...(costs ? [head("Penalty")] : []), head("Total")];
  const figures = ({ rewards, penalty, total }, count = 1) => [...kinds.map((kind) => rewards[kind]), ...(costs ? [-penalty] : []), total].map((value) => value / count);
  const rows = shown.results.map((result, i) => row(names()[i], [cell(`${flagged(result)} of ${result.segments.length}`), ...figures(result).map((value) => cell(number(value)))]));
  if (shown.results.length === 2) {
    const [a, b] = shown.results;
    const change = (value, digits, better) => {
      const verdict = Math.abs(value) < 0.005 ? "same" : better ? "better" : "worse";
      return el("td", { class: verdict }, number(value, digits, true), el("span", { class: "hidden" }, ` ${verdict}`));
    };
    const gain = (value) => change(value, 2, value > 0);
    const fewer = flagged(b) - flagged(a);
    const changes = ([old, now]) => now.map((value, i) => gain(value - old[i]));
    rows.push(row("Change", [change(fewer, 0, fewer < 0), ...changes(shown.results.map((result) => figures(result)))]));
    // Sums grow with a text; means compare texts of different lengths.
    const counts = shown.results.map((result) => Math.max(1, result.segments.length));
    const means = shown.results.map((result, i) => figures(result, counts[i]));
    const shares = shown.results.map((result, i) => flagged(result) / counts[i]);
    means.forEach((mean, i) => rows.push(row(`${names()[i]}, mean of a sub-sentence`, [cell(percent(shares[i])), ...mean.map((value) => cell(number(value)))])));
    const share = shares[1] - shares[0];
    const points = el("td", { class: Math.abs(share) < 0.005 ? "same" : share < 0 ? "better" : "worse" }, `${number(100 * share, 0, true)} points`);
    rows.push(row("Change of the mean", [points, ...changes(means)]));
  }
  $("totals").replaceChildren(el("caption", { class: "hidden" }, "Rewards"), el("thead", {}, el("tr", {}, ...heads)), el("tbody", {}, ...rows));
}

async function copy() {
  const text = JSON.stringify(shown, null, 2);
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without a secure context (plain HTTP to another host) there is only the old way.
    const area = el("textarea", { class: "hidden" }, text);
    document.body.append(area);
    area.select();
    done = document.execCommand("copy");
    area.remove();
    $("copy").focus();
  }
  const said = done ? "Copied" : "Not copied";
  $("copy").textContent = said;
  $("status").textContent = `${said}.`;
  setTimeout(() => ($("copy").textContent = "Copy as JSON"), 2000);
}

// ---- details of a segment -------------------------------------------------------------------

let leaving = 0;
let owner = null;

function showTip(element) {
  clearTimeout(leaving);
  owner?.classList.remove("on");
  owner = element;
  owner.classList.add("on");
  const { kinds: scores, facts, reward, penalty } = element.segment;
  const head = ["", ...Object.values(CLASSES), "reward"].map((name) => el("th", { scope: "col" }, name));
  const rows = kinds.map((kind) => {
    const probs = scores[kind];
    const cells = Object.keys(CLASSES).map((name) => {
      const cell = el("td", { class: `meter${likely(probs) === name ? " top" : ""}` }, percent(probs[name]));
      if (name === "hallu") inked(cell, kind);
      cell.style.setProperty("--p", probs[name]);
      return cell;
    });
    return el("tr", {}, el("th", { scope: "row" }, chip(kind), el("span", { class: "word" }, title(kind))), ...cells, el("td", {}, number(probs.reward)));
  });
  if (penalty) rows.push(el("tr", {}, el("th", { scope: "row" }, "Penalty"), el("td", { colspan: 4 }, number(-penalty))));
  rows.push(el("tr", {}, el("th", { scope: "row" }, "Sum"), el("td", { colspan: 4 }, number(reward))));
  const parts = [el("table", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows))];
  if (facts) {
    const list = facts.map((fact) => el("li", {}, chip(fact.kind), fact.text));
    parts.push(el("div", { class: "facts" }, list.length ? "Facts it states" : "It states no facts.", el("ul", {}, ...list)));
  }
  $("tip").replaceChildren(...parts);
  $("tip").hidden = false;
  const lines = element.getClientRects();
  const last = lines[lines.length - 1];
  const { width, height } = $("tip").getBoundingClientRect();
  const room = document.documentElement.clientWidth - width - 8;
  const above = last.bottom + height + 8 > innerHeight && lines[0].top > height + 8;
  $("tip").style.left = `${Math.max(8, Math.min(last.left, room)) + scrollX}px`;
  $("tip").style.top = `${(above ? lines[0].top - height - 7 : last.bottom + 7) + scrollY}px`;
}

function hideTip() {
  clearTimeout(leaving);
  owner?.classList.remove("on");
  owner = null;
  $("tip").hidden = true;
}

function leaveTip() {
  clearTimeout(leaving);
  leaving = setTimeout(() => {
    const focused = document.activeElement?.closest(".segment");
    if (focused) showTip(focused);
    else hideTip();
  }, 200);
}

function moveFocus(event) {
  const from = event.target.closest(".segment");
  if (!from) return;
  const all = [...from.parentElement.querySelectorAll(".segment")];
  const at = all.indexOf(from);
  const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: all.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  all[Math.max(0, Math.min(to, all.length - 1))].focus();
}

// ---- events ---------------------------------------------------------------------------------

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  score();
});
$("form").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  if (event.target === $("key")) {
    event.preventDefault();
    useKey();
  } else if (event.ctrlKey || event.metaKey) score();
});
$("use-key").addEventListener("click", useKey);
$("copy").addEventListener("click", copy);
$("stop").addEventListener("click", () => ($("wait").hidden = true));
$("kinds").addEventListener("change", paint);
for (const button of document.querySelectorAll(".generate")) button.addEventListener("click", () => generate(button));

$("compare").addEventListener("click", () => {
  $("second").hidden = comparing();
  $("compare").setAttribute("aria-expanded", comparing());
  $("compare").textContent = comparing() ? "Score one text" : "Compare two texts";
  $("text-label").textContent = comparing() ? "Text before" : "Text";
  if (comparing()) $("text2").focus();
});
$("example").addEventListener("click", () => {
  setImage(EXAMPLE.image, "Example image");
  $("text").value = EXAMPLE.text;
  $("text2").value = EXAMPLE.text2;
  clearMessages();
});

$("image").addEventListener("change", () => takeFile($("image").files[0]));
$("preview").addEventListener("load", () => {
  $("preview").hidden = false;
  $("preview").classList.toggle("tiny", $("preview").naturalWidth < 160);
});
$("preview").addEventListener("error", () => ($("preview").hidden = true));
document.addEventListener("paste", ({ clipboardData: data }) => {
  // Office programs put a picture of the text beside the text.
  if (!data.types.includes("text/plain")) takeFile(data.files[0]);
});
document.addEventListener("dragover", (event) => {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  $("drop").classList.add("over");
});
document.addEventListener("dragleave", (event) => event.relatedTarget ?? $("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  $("drop").classList.remove("over");
  takeFile(event.dataTransfer.files[0]);
});

$("texts").addEventListener("pointerover", (event) => {
  const segment = event.target.closest(".segment");
  if (segment) showTip(segment);
  else leaveTip();
});
$("texts").addEventListener("pointerleave", leaveTip);
$("tip").addEventListener("pointerenter", () => clearTimeout(leaving));
$("tip").addEventListener("pointerleave", leaveTip);
$("texts").addEventListener("focusin", (event) => {
  const segment = event.target.closest(".segment");
  if (!segment) return;
  for (const other of segment.parentElement.querySelectorAll(".segment")) other.tabIndex = other === segment ? 0 : -1;
  showTip(segment);
});
$("texts").addEventListener("focusout", leaveTip);
$("texts").addEventListener("keydown", moveFocus);
document.addEventListener("keydown", (event) => event.key === "Escape" && hideTip());

start();
