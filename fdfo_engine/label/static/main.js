// The page: what is asked, the pairs that wait, keys, and what goes on meanwhile.

import * as api from "./api.js";
import { preload } from "./images.js";
import { banner, button, card, header, hints, numbers, people, strip, tell } from "./panels.js";
import * as stage from "./stage.js";

const $ = (id) => document.getElementById(id);
const BUSY_MS = 400;
const CALM_MS = 2500;
const WORDS = { left: "Left", right: "Right", tie: "No preference", skip: "Skipped" };

let state = null; // what the page's process last said
let held = { round: null, due: [], answers: [] }; // the pairs of the round on screen
let shownAt = 0;
let isBusy = false; // an answer is on its way, or the next pair: what is pressed meanwhile is no answer to it
let turn = Promise.resolve(); // the last thing that was begun
let isWhole = true; // both images of the pair on screen are there

const scene = () => document.body.dataset.scene;
const answered = () => held.answers.filter((answer) => !answer.repeat);
const judged = () => answered().filter((answer) => answer.choice !== "skip").length;

// ---- answers

function busy(on) {
  isBusy = on;
  $("frames").setAttribute("aria-busy", String(on));
}

function choose(choice) {
  if (!isBusy && scene() === "labelling") turn = give(choice);
}

async function give(choice) {
  const pair = held.due[0];
  if (!isWhole) {
    if (choice === "skip") await putBack();
    return;
  }
  busy(true);
  stage.mark(choice, null);
  const answer = {
    round: held.round, pair_id: pair.pair_id, repeat: pair.repeat, attempt: pair.attempt, choice,
    ms: Math.round(performance.now() - shownAt), ...stage.counts,
  };
  try {
    const { event } = await api.label(answer);
    held.due.shift();
    held.answers.push({ event, pair, pair_id: pair.pair_id, choice, repeat: pair.repeat });
    banner(null);
    tell(`${WORDS[choice]}. Recorded.`);
    await showNext();
    if (scene() !== "labelling") await refresh(); // what all answers say now
  } catch (error) {
    stage.mark(null, null);
    await refused(error, "Your choice was not recorded");
  } finally {
    busy(false);
  }
}

// A pair whose image cannot be shown comes again at the end, and after a reload.
async function putBack() {
  held.due.push({ ...held.due.shift(), wasAbsent: true });
  await showNext();
}

// Pressed twice in a row, two answers are taken back, one after the other.
function undo() {
  turn = turn.then(takeBack);
}

async function takeBack() {
  const last = held.answers.at(-1);
  if (!last) return;
  busy(true);
  try {
    await api.undo(held.round, last.event);
    banner(null);
    tell("Taken back.");
    await load();
  } catch (error) {
    await refused(error, "It was not taken back");
  } finally {
    busy(false);
  }
}

async function refused(error, what) {
  if (!(error instanceof api.Refusal)) throw error;
  banner(`${what}: ${error.message}`);
  if (error.status === 409 || error.status === 404) await load(); // the round has moved on
}

// ---- what is on screen

async function load() {
  held = await api.round();
  await showNext();
}

async function showNext() {
  paint();
  if (scene() !== "labelling") return;
  const pair = held.due[0];
  stage.mark(null, null);
  $("prompt").textContent = pair.prompt;
  isWhole = await stage.show(pair);
  shownAt = performance.now();
  for (const made of document.querySelectorAll(".choice")) made.disabled = !isWhole;
  preload(held.due);
}

function paint() {
  document.body.dataset.scene = sceneOf();
  if (!state) return;
  const row = state.round;
  const isComparison = row?.kind === "comparison";
  $("question").textContent = state.question || "Which image is better?";
  $("tie").textContent = state.tie ? `No preference means: ${state.tie}` : "";
  const total = row?.state === "open" && held.round === row.id ? held.due.length + held.answers.length : 0;
  header(row ? (isComparison ? "Comparison" : `Round ${row.number}`) : "fdfo label", held.answers.length, total);
  $("undo").disabled = !held.answers.length;
  $("actions-panel").hidden = scene() !== "labelling" || isComparison || !state.is_owner;
  $("train-early").disabled = !judged();
  $("train-early").textContent = judged() ? `Train on these ${judged()}` : "Train on these";
  $("round-note").textContent = "The round trains when all pairs are answered. You can also train earlier.";
  $("compare").disabled = !state.rounds_trained || state.activity !== "labelling" || isComparison;
  hints(state.hints);
  numbers(state.mine);
  strip(state.strip);
  people(state);
  if (scene() !== "labelling") card(cardOf());
}

function sceneOf() {
  if (!state) return "starting";
  const isOpen = state.activity === "labelling" && held.round === state.round?.id;
  return isOpen && held.due.some((pair) => !pair.wasAbsent) ? "labelling" : "waiting";
}

function cardOf() {
  const { activity, phase } = state;
  if (state.problem) return troubleCard();
  if (activity === "labelling") return state.round.kind === "comparison" ? resultCard() : endCard();
  const titles = {
    starting: "The engine is starting", away: "The engine does not answer", sampling: "Drawing the next pairs",
    training: "Training on your choices", comparing: "Drawing images to compare",
  };
  const texts = {
    sampling: "They come by themselves. You can also go away: nothing is lost.",
    training: "The model learns what you preferred. The next pairs come by themselves.",
    comparing: "The same prompts and the same noise, before and after training; you won't be told which is which.",
  };
  return { title: titles[activity], text: texts[activity] ?? "", phase: phase ?? {} };
}

function troubleCard() {
  const { detail, fix, code } = state.problem;
  const actions = state.is_owner && code !== "engine_away"
    ? [button("Try again", () => asked(api.again)), button("New round", () => asked(api.next))]
    : [];
  return { title: "Something is in the way", text: [detail, fix].filter(Boolean).join(" · "), actions };
}

function endCard() {
  if (held.round !== state.round.id) return { title: "One moment", phase: {} };
  const absent = held.due.length;
  const note = absent ? ` Pairs with an image that cannot be shown: ${absent}. They come again after a reload.` : "";
  if (!state.is_owner) return { title: "Thank you, that was all", text: `The owner of the run starts training.${note}` };
  const count = judged();
  return {
    title: "All pairs of this round are answered",
    text: `${count} choices. Backspace takes the last ones back, as long as you have not trained.${note}`,
    actions: [...(count ? [button(`Train on these ${count} ⏎`, trainNow, true)] : [button("New round", () => asked(api.next))]),
      button("Undo", undo)],
  };
}

function resultCard() {
  const { wins, losses, ties, rate, p } = state.comparison;
  const range = rate.total ? ` (95 %: ${Math.round(100 * rate.low)} to ${Math.round(100 * rate.high)} %)` : "";
  return {
    title: "The trained model against the untrained one",
    big: rate.total ? `${Math.round(100 * rate.value)} %` : "–",
    text: `of your choices went to the trained model${range}: ${wins} to ${losses}, with ${ties} ties. ` +
      `Sign test: p = ${p < 0.001 ? "less than 0.001" : p.toFixed(3)}.`,
    actions: state.is_owner ? [button("Go on training", () => asked(api.next), true)] : [],
  };
}

// ---- training

async function asked(request) {
  try {
    await request();
    banner(null);
  } catch (error) {
    await refused(error, "That did not work");
  }
  await refresh();
}

const trainNow = () => asked(() => api.train(held.round));

function trainEarly() {
  $("confirm-text").textContent =
    `Train on these ${judged()} choices now? The other ${held.due.length} pairs are left out, and what you chose can no longer be changed.`;
  $("confirm").returnValue = "no";
  $("confirm").showModal();
}

// ---- what goes on

async function refresh() {
  try {
    state = await api.state();
    if (state.problem?.code !== "engine_away" && $("banner").dataset.away) {
      delete $("banner").dataset.away;
      banner(null);
    }
    const isNew = state.activity === "labelling" && held.round !== state.round.id;
    if (isNew && !isBusy) await load();
    else paint();
  } catch (error) {
    if (!(error instanceof api.Refusal)) throw error;
    if (error.status === 401) return void lockedOut(error);
    banner(error.message);
    $("banner").dataset.away = "yes";
  }
}

function lockedOut() {
  document.body.dataset.scene = "waiting";
  card({ title: "Open the page by its link", text: "It was printed where the page was started, or sent to you by the owner of the run." });
}

async function watch() {
  await refresh();
  setTimeout(watch, scene() === "labelling" ? CALM_MS : BUSY_MS);
}

// ---- keys

const SHIFTED = { ArrowLeft: [-8, 0], ArrowRight: [8, 0], ArrowUp: [0, -8], ArrowDown: [0, 8] };
const ONCE = {
  ArrowLeft: () => choose("left"), ArrowRight: () => choose("right"), ArrowDown: () => choose("tie"), " ": () => choose("tie"),
  s: () => choose("skip"), Backspace: undo, z: () => stage.zoom(), v: stage.toggleView, f: () => stage.hold(true),
  "?": () => $("keys").showModal(),
  Enter: () => $("card-actions").querySelector(".main")?.click(),
};

function onKey(event) {
  const { target } = event;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const isForElement = ["Enter", " "].includes(key) && target.closest("button, a, input");
  if (event.ctrlKey || event.metaKey || event.altKey || isForElement || target.matches("input") || document.querySelector("dialog[open]")) return;
  if (event.shiftKey && SHIFTED[key]) {
    stage.move(...SHIFTED[key]);
  } else if (ONCE[key]) {
    if (!event.repeat) ONCE[key]();
  } else {
    return;
  }
  event.preventDefault();
}

function listen() {
  document.addEventListener("keydown", onKey);
  document.addEventListener("keyup", (event) => event.key.toLowerCase() === "f" && stage.hold(false));
  document.addEventListener("click", (event) => event.detail && event.target.closest("button")?.blur()); // space is a key here
  for (const made of document.querySelectorAll("[data-choice]")) {
    made.addEventListener("click", () => choose(made.dataset.choice));
  }
  $("undo").addEventListener("click", undo);
  $("zoom").addEventListener("click", () => stage.zoom());
  $("view").addEventListener("click", stage.toggleView);
  $("flip").addEventListener("pointerdown", () => stage.hold(true));
  $("flip").addEventListener("keydown", (event) => [" ", "Enter"].includes(event.key) && stage.hold(true));
  $("flip").addEventListener("keyup", () => stage.hold(false));
  $("show-keys").addEventListener("click", () => $("keys").showModal());
  $("train-early").addEventListener("click", trainEarly);
  $("confirm").addEventListener("close", () => $("confirm").returnValue === "yes" && trainNow());
  $("compare").addEventListener("click", () => asked(api.compare));
  $("invite").addEventListener("submit", async (event) => {
    event.preventDefault();
    await asked(async () => ($("invited").textContent = (await api.link($("rater").value)).link));
  });
  stage.listen(choose);
}

async function enter() {
  const word = location.hash.slice(1);
  if (!word.includes("~")) return;
  history.replaceState(null, "", "/"); // the word is for this once
  await api.enter(word).catch((error) => banner(error.message));
}

listen();
await enter();
await watch();
