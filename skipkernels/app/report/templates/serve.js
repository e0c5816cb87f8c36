"use strict";
// A client of POST predict: one image in a request, so that each result comes as soon as it is there.
const $ = (id) => document.getElementById(id);
const files = $("files"), drop = $("drop"), results = $("results"), state = $("state"), clear = $("clear");
const most = Number(results.dataset.bytes), queue = [];
let running = false, shown = 0, done = 0;

const copy = (id) => $(id).content.firstElementChild.cloneNode(true);
const percent = (p) => (p < 0.01 ? "<1 %" : p > 0.99 && p < 1 ? ">99 %" : `${Math.round(100 * p)} %`);
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;

function add(list) {
  const cards = [];
  for (const file of list) {
    const card = copy("card"), preview = card.querySelector("img");
    card.querySelector(".file").textContent = file.name;
    card.querySelector(".file").title = file.name;
    preview.onload = () => URL.revokeObjectURL(preview.src);
    preview.onerror = () => preview.removeAttribute("src"); // a format that the browser can't show
    if (file.size <= most) preview.src = URL.createObjectURL(file);
    cards.push(card);
    queue.push([file, card]);
  }
  results.prepend(...cards);
  shown += cards.length;
  if (!running) run();
}

async function run() {
  running = true;
  while (queue.length) {
    tell();
    const [file, card] = queue.shift();
    if (!card.isConnected) continue; // removed
    try {
      show(card, await predict(file, card));
    } catch (error) {
      fail(card, error.message);
    }
    card.removeAttribute("aria-busy");
    if (card.isConnected) done += 1;
  }
  running = false;
  tell();
}

function tell() {
  clear.hidden = !shown;
  state.textContent = !shown ? "" : running ? `${done} of ${shown} done` : shown === 1 ? "1 image" : `${shown} images`;
}

async function predict(file, card) {
  if (file.size > most) throw Error(`too large: ${megabytes(file.size)}; the most is ${megabytes(most)}.`);
  say(card, "classifying …");
  const body = new FormData();
  body.append("image", file);
  let response;
  try {
    response = await fetch("predict", { method: "POST", body });
  } catch {
    throw Error("the server does not answer. Was it stopped?");
  }
  const found = await response.json().catch(() => ({ error: `the server answered ${response.status}` }));
  if (!response.ok) throw Error(found.error);
  return found.images[0];
}

function say(card, text) {
  card.querySelector(".said").textContent = text;
}

function fail(card, text) {
  const name = `${card.querySelector(".file").textContent}: `; // is shown above
  say(card, text.startsWith(name) ? text.slice(name.length) : text);
  card.classList.add("failed");
}

function show(card, { predictions }) {
  say(card, "");
  const none = predictions[0].probability === null;
  card.classList.add(none ? "none" : "done");
  card.querySelector("h2").textContent = predictions[0].label;
  for (const { label, probability } of none ? predictions.slice(1) : predictions) {
    const row = copy("row");
    row.querySelector(".label").textContent = label;
    row.querySelector("meter").value = probability;
    row.querySelector("meter").setAttribute("aria-label", label);
    row.querySelector(".percent").textContent = percent(probability);
    card.querySelector(".bars").append(row);
  }
  card.querySelector(".bars li")?.classList.add("best");
}

files.disabled = false;
files.addEventListener("change", () => {
  add([...files.files]);
  files.value = ""; // so that the same file can be chosen again
});
for (const type of ["dragenter", "dragover"]) drop.addEventListener(type, (event) => {
  event.preventDefault();
  drop.classList.add("over");
});
for (const type of ["dragleave", "drop"]) drop.addEventListener(type, () => drop.classList.remove("over"));
for (const type of ["dragover", "drop"]) addEventListener(type, (event) => event.preventDefault()); // beside the zone
addEventListener("drop", (event) => add([...event.dataTransfer.files]));
addEventListener("paste", (event) => add([...event.clipboardData.files]));
clear.addEventListener("click", () => {
  queue.length = 0;
  results.replaceChildren();
  shown = done = 0;
  tell();
  files.focus();
});
$("curl").textContent = `curl -F image=@photo.jpg ${new URL("predict", location)}`;
