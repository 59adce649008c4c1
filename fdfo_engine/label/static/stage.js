// The two images on screen: flip in place, side by side, zoom in step.

import { ready } from "./images.js";

const SIDES = ["left", "right"];
const body = document.body;
const frames = document.getElementById("frames");
const picture = (side) => frames.querySelector(`[data-side=${side}] .picture`);
const thumb = (side) => document.querySelector(`.peek[data-side=${side}] .thumb`);

export const counts = { flips: 0, zooms: 0 };
let resting = "left"; // what is shown while nothing is held
let held = false;

function paint() {
  const other = resting === "left" ? "right" : "left";
  body.dataset.shown = held ? other : resting;
  for (const button of document.querySelectorAll(".peek")) {
    button.setAttribute("aria-pressed", String(button.dataset.side === body.dataset.shown));
  }
}

export function hold(on) {
  if (held === on || body.dataset.view !== "flip") return;
  held = on;
  if (on) counts.flips += 1;
  paint();
}

export function rest(side) {
  if (side !== resting) counts.flips += 1;
  resting = side;
  held = false;
  paint();
}

export function toggleView() {
  const isSide = body.dataset.view !== "side";
  body.dataset.view = isSide ? "side" : "flip";
  held = false;
  document.getElementById("view").setAttribute("aria-pressed", String(isSide));
  paint();
}

export function zoom(on = !("zoomed" in body.dataset)) {
  if (on) {
    body.dataset.zoomed = "";
    counts.zooms += 1;
  } else {
    delete body.dataset.zoomed;
  }
  document.getElementById("zoom").setAttribute("aria-pressed", String(on));
}

const centre = { x: 50, y: 50 };

export function move(dx, dy) {
  look(centre.x + dx, centre.y + dy);
}

function look(x, y) {
  centre.x = Math.min(100, Math.max(0, x));
  centre.y = Math.min(100, Math.max(0, y));
  frames.style.setProperty("--x", `${centre.x}%`);
  frames.style.setProperty("--y", `${centre.y}%`);
}

function follow(event) {
  const area = event.target.closest(".picture")?.getBoundingClientRect();
  if (area) look((100 * (event.clientX - area.left)) / area.width, (100 * (event.clientY - area.top)) / area.height);
}

// Shows a pair; false where one of its images cannot be had.
export async function show(pair) {
  counts.flips = counts.zooms = 0;
  resting = "left";
  held = false;
  zoom(false);
  counts.zooms = 0;
  const images = await Promise.allSettled(SIDES.map((side) => ready(pair[side])));
  images.forEach(({ value }, place) => put(SIDES[place], value, pair.prompt));
  const first = images.find(({ value }) => value)?.value;
  if (first) body.style.setProperty("--aspect", `${first.naturalWidth} / ${first.naturalHeight}`);
  resting = SIDES.find((_, place) => !images[place].value) ?? "left"; // what is wrong is seen first
  paint();
  return images.every(({ status }) => status === "fulfilled");
}

function put(side, image, prompt) {
  if (!image) {
    picture(side).replaceChildren("This image cannot be shown. Skip to the next pair; this one comes again.");
    thumb(side).replaceChildren();
    return;
  }
  image.alt = `${side === "left" ? "Left" : "Right"} image for: ${prompt}`;
  picture(side).replaceChildren(image);
  const small = image.cloneNode();
  small.alt = "";
  thumb(side).replaceChildren(small);
}

export function mark(pending, chosen) {
  for (const [name, value] of Object.entries({ pending, chosen })) {
    if (value) frames.dataset[name] = value;
    else delete frames.dataset[name];
  }
}

// By mouse and touch: in place, pressing an image shows the other one; side by side, a click chooses it.
export function listen(choose) {
  frames.addEventListener("contextmenu", (event) => event.preventDefault());
  frames.addEventListener("pointermove", follow);
  frames.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || !event.target.closest(".picture")) return;
    follow(event);
    hold(true);
  });
  for (const name of ["pointerup", "pointercancel", "blur"]) window.addEventListener(name, () => hold(false));
  frames.addEventListener("click", (event) => {
    const frame = event.target.closest(".frame");
    if (frame && body.dataset.view === "side" && !("zoomed" in body.dataset)) choose(frame.dataset.side);
  });
  for (const button of document.querySelectorAll(".peek")) {
    button.addEventListener("click", () => rest(button.dataset.side));
  }
}
