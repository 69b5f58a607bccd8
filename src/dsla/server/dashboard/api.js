// Asking the server. Keys live in this tab only: sessionStorage, never a cookie, a link or localStorage.

const STORES = { admin: "dsla-admin-key", api: "dsla-api-key" };

// The server answered, and the answer is no.
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function setKey(kind, key) {
  sessionStorage.setItem(STORES[kind], key);
}

export const hasKey = (kind) => sessionStorage.getItem(STORES[kind]) !== null;

// Asks with the key of a kind, `admin` or `api`; with a body, by POST. Throws `Refused`, or what `fetch` throws where nobody
// answers.
export async function ask(kind, path, { body, signal } = {}) {
  const key = sessionStorage.getItem(STORES[kind]);
  const headers = key === null ? {} : { Authorization: `Bearer ${key}` };
  const options = { headers, signal, cache: "no-store" };
  if (body !== undefined) {
    headers["Content-Type"] = "application/json";
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  }
  const response = await fetch(path, options);
  if (!response.ok) throw new Refused(response.status, await message(response));
  return response;
}

async function message(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered with status ${response.status}`;
  }
}
