// Images of pairs, loaded ahead: an element that is decoded already shows at once.

const AHEAD = 2;
const SMALL = 160; // pixels: smaller images are enlarged without blur
const loaded = new Map();

function load(id) {
  const image = new Image();
  image.decoding = "sync";
  image.draggable = false;
  image.src = `/img/${id}`;
  const ready = image.decode().then(() => {
    image.classList.toggle("small", image.naturalWidth < SMALL);
    return image;
  });
  ready.catch(() => loaded.delete(id)); // asked for again when it is shown again
  return ready;
}

export function ready(id) {
  if (!loaded.has(id)) loaded.set(id, load(id));
  return loaded.get(id);
}

// Loads the next pairs, and forgets those that were answered.
export function preload(due) {
  const wanted = new Set(due.slice(0, AHEAD + 1).flatMap((pair) => [pair.left, pair.right]));
  for (const id of wanted) ready(id).catch(() => {}); // told when it is its turn
  for (const id of loaded.keys()) if (!wanted.has(id)) loaded.delete(id);
}

// A small picture that loads when it is near the screen.
export function thumbnail(id, text) {
  const image = new Image();
  image.loading = "lazy";
  image.alt = text;
  image.onload = () => image.classList.toggle("small", image.naturalWidth < SMALL);
  image.src = `/img/${id}`;
  return image;
}
