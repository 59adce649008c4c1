// Requests to the page's own process. What it refuses is thrown as a Refusal with its words.

export class Refusal extends Error {
  constructor(status, code, detail) {
    super(detail);
    this.status = status;
    this.code = code;
  }
}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { credentials: "same-origin", cache: "no-store", ...options });
  } catch {
    throw new Refusal(0, "page_away", "The page's process does not answer. Nothing was recorded; it is asked again.");
  }
  const body = response.status === 204 ? {} : await response.json().catch(() => ({}));
  if (!response.ok) throw new Refusal(response.status, body.code, body.detail ?? `answered ${response.status}`);
  return body;
}

const send = (name, body) =>
  ask(`/api/${name}`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });

export const enter = (word) => send("session", { word });
export const state = () => ask("/api/state");
export const round = () => ask("/api/round");
export const label = (answer) => send("label", answer);
export const undo = (round, event) => send("undo", { round, event });
export const train = (round) => send("train", { round });
export const compare = () => send("compare", {});
export const next = () => send("next", {});
export const again = () => send("again", {});
export const link = (name) => send("link", { name });
