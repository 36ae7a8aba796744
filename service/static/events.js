/**
 * Server-sent events that survive a restart of the API: what was missed is sent again after `Last-Event-ID`.
 *
 * Read by hand: the browser's own EventSource gives up for ever once it is answered with an error, as a service that
 * starts answers 503, and a new one cannot say which event it has seen.
 */
import { connection, request } from "./api.js";

const LONGEST_PAUSE_MS = 5000;

/** The events of a body, one after another: `{event, id, data}`, `data` parsed where it is JSON. */
export async function* readEvents(body) {
  const decoder = new TextDecoder();
  const reader = body.getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      text += decoder.decode(value, { stream: true });
      const blocks = text.split(/\r?\n\r?\n/);
      text = blocks.pop();
      for (const block of blocks) {
        const event = parseBlock(block);
        if (event) yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parseBlock(block) {
  const event = { event: "message", id: null, data: null };
  const data = [];
  for (const line of block.split(/\r?\n/)) {
    const [, name, value] = /^([^:]*):? ?(.*)$/s.exec(line);
    if (name === "data") data.push(value);
    else if (name === "event") event.event = value;
    else if (name === "id") event.id = value;
  }
  if (!data.length) return event.id === null ? null : event; // how far the stream is
  const text = data.join("\n");
  try {
    event.data = JSON.parse(text);
  } catch {
    event.data = text;
  }
  return event;
}

/**
 * Follow a stream until it ends with 204, or until the returned function is called.
 *
 * `handlers`: event name -> function of its data; `onReconnect`: called after each lost connection was made again, when a
 * view reads anew what carries no id; `onEnd`: called once all has been sent; `onRefused`: an ApiError of 4xx.
 */
export function follow(path, handlers, { query, onReconnect, onEnd, onRefused } = {}) {
  const aborter = new AbortController();
  let lastId = null;
  let pause = 250;
  let wasLost = false;

  async function once() {
    const headers = lastId === null ? {} : { "Last-Event-ID": lastId };
    const answer = await request("GET", path, { query, headers, signal: aborter.signal });
    if (answer.status === 204) return true;
    pause = 250;
    if (wasLost) onReconnect?.();
    for await (const { event, id, data } of readEvents(answer.body)) {
      if (aborter.signal.aborted) return true;
      if (id !== null) lastId = id;
      if (data !== null) handlers[event]?.(data);
    }
    return false;
  }

  (async () => {
    while (!aborter.signal.aborted) {
      try {
        if (await once()) return aborter.signal.aborted || onEnd?.();
        // A stream ends after the last event, or because the API stops: asking again tells which.
        wasLost = true;
      } catch (error) {
        if (aborter.signal.aborted) return undefined;
        if (error.status >= 400 && error.status < 500 && error.status !== 429) return onRefused?.(error);
        wasLost = true;
        connection.value = "offline";
      }
      await new Promise((resolve) => setTimeout(resolve, pause));
      pause = Math.min(2 * pause, LONGEST_PAUSE_MS);
    }
    return undefined;
  })();
  return () => aborter.abort();
}

/** `action`, called once within `ms` milliseconds however often it is asked for, and not again before `rest(took)`
 * milliseconds have passed since. */
export function coalesced(action, ms, rest = () => 0) {
  let timer = 0;
  const ask = () => {
    timer ||= setTimeout(async () => {
      const began = performance.now();
      await action();
      timer = setTimeout(() => (timer = 0), rest(performance.now() - began));
    }, ms);
  };
  ask.cancel = () => clearTimeout(timer);
  return ask;
}
