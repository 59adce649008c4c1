// Everything beside the pair: progress, numbers, the strip, the card that stands in its place.

import { thumbnail } from "./images.js";

const $ = (id) => document.getElementById(id);
const PHASES = { rollout: "Drawing pairs", generation: "Drawing images", update: "Training", encoding: "Reading prompts" };
const percent = (value) => `${Math.round(100 * value)} %`;

export function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

export function button(text, act, isMain = false) {
  const made = element("button", text, isMain ? "main" : "");
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

export function banner(text) {
  $("banner").textContent = text ?? "";
  $("banner").hidden = !text;
}

export function tell(text) {
  $("say").textContent = text;
}

// The card: a title, a text, buttons, and a bar where something is under way.
export function card({ title, text = "", big = "", phase = null, actions = [] }) {
  $("card-title").textContent = title;
  $("card-text").replaceChildren(...(big ? [element("span", big, "big"), element("br")] : []), text);
  const bar = $("card-progress");
  bar.hidden = !phase;
  if (phase && phase.total) {
    bar.max = phase.total;
    bar.value = phase.done;
  } else {
    bar.removeAttribute("value");
  }
  $("card-eta").textContent = phase ? phaseText(phase) : "";
  const wanted = actions.map((action) => action.textContent).join();
  if ($("card-actions").dataset.wanted !== wanted) {
    $("card-actions").dataset.wanted = wanted;
    $("card-actions").replaceChildren(...actions);
  }
}

function phaseText({ name, done, total, eta_s: eta }) {
  if (!name) return "";
  const left = eta ? `, about ${eta < 90 ? `${Math.ceil(eta)} s` : `${Math.ceil(eta / 60)} min`} more` : "";
  return `${PHASES[name] ?? name}: ${done} of ${total}${left}`;
}

export function header(name, answered, total) {
  $("round-name").textContent = name;
  $("round-count").textContent = total ? `${answered} of ${total}` : "";
  $("round-progress").max = total || 1;
  $("round-progress").value = total ? answered : 0;
}

function rows(list, entries) {
  list.replaceChildren(
    ...entries.flatMap(([name, value, note]) => {
      const told = element("dd", value);
      if (note) told.append(element("small", note));
      return [element("dt", name), told];
    }),
  );
}

const share = ({ count, total, value, low, high }) =>
  total ? [percent(value), `${count} of ${total}; 95 %: ${Math.round(100 * low)} to ${percent(high)}`] : ["–"];

export function numbers(mine) {
  $("numbers-panel").hidden = !mine || mine.answers + mine.skips === 0;
  if (!mine) return;
  const entries = [
    ["Answered", `${mine.answers}`, mine.skips ? `and ${mine.skips} skipped` : ""],
    ["No preference", `${mine.ties}`],
    ["Left rather than right", ...share(mine.left)],
    ["The same answer again", ...share(mine.steady)],
  ];
  if (mine.median_s !== null) entries.push(["Seconds a pair", mine.median_s.toFixed(1)]);
  if (mine.hasty) entries.push(["Faster than 0.35\u00a0s", `${mine.hasty}`, "kept, and flagged"]);
  rows($("numbers"), entries);
}

export function people(state) {
  $("owner-panel").hidden = !state.is_owner;
  const agreed = (state.agreement ?? []).map(([one, other, pairs, kappa]) => [
    `${one} and ${other}`, kappa === null ? "–" : `κ ${kappa.toFixed(2)}`, `${pairs} pairs in common`,
  ]);
  rows($("people"), [["Raters", (state.raters ?? []).join(", ") || "–"], ...agreed]);
}

export function hints(sentences) {
  $("hints").hidden = !sentences?.length;
  $("hints").replaceChildren(...(sentences ?? []).map((text) => element("li", text)));
  if (sentences?.length) $("hints").append(element("li", "It may be a good moment to train, or to rest."));
}

export function strip(epochs) {
  $("strip-panel").hidden = !epochs.length;
  const key = epochs.map(({ epoch }) => epoch).join();
  if ($("strip").dataset.key === key) return;
  $("strip").dataset.key = key;
  const head = element("tr");
  head.append(...epochs.map(({ epoch }) => element("th", epoch ? `round ${epoch}` : "start")));
  const lines = (epochs[0]?.images ?? []).map((_, line) => {
    const row = element("tr");
    for (const { epoch, images } of epochs) {
      const cell = element("td");
      const text = `${images[line].prompt}, ${epoch ? `after round ${epoch}` : "before training"}`;
      cell.append(thumbnail(images[line].image, text));
      row.append(cell);
    }
    return row;
  });
  $("strip").replaceChildren(head, ...lines);
  $("strip-scroll").scrollLeft = $("strip-scroll").scrollWidth;
}
