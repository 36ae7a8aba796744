/**
 * A text token by token, each with colours of its own. One token is pointed at, by the mouse or the arrow keys; views read
 * which from a signal, and texts that share the signal show the same place.
 */
import { effect } from "@preact/signals";
import { html } from "htm/preact";
import { useEffect, useMemo, useRef } from "preact/hooks";
import { loadStyle } from "./basics.js";

await loadStyle("charts");

/** The class of a loss in nats: `loss-1` to `loss-10` for 0.25 to 5 and more; none below. */
export function lossClass(loss) {
  const rank = Math.min(Math.round(loss * 2), 10);
  return rank > 0 ? `loss-${rank}` : "";
}

/** A token's text as it can be seen: line ends and other control characters have signs, and a part of a character too. */
export const visible = (text) =>
  text
    .replace(/\n/g, "⏎\n")
    .replace(/\t/g, "⇥")
    .replace(/[\0-\x09\x0b-\x1f]/g, (sign) => String.fromCharCode(0x2400 + sign.charCodeAt(0)))
    .replace(/\ufffd/g, "◌");

/**
 * `tokens`: anything; `text(token, i)`, `kind(token, i)`: what is written and with which classes; `style(token, i)`: an
 * object of styles, or null. `pointed`: a signal of the index pointed at, or null. `label`: what the text is.
 */
export function Tokens({ tokens, text, kind, style, pointed, label, onPick }) {
  const place = useRef();
  useEffect(() => {
    let marked = null;
    const stop = effect(() => {
      marked?.classList.remove("pointed");
      marked = place.current?.children[pointed.value ?? -1] ?? null;
      marked?.classList.add("pointed");
    });
    return () => {
      stop();
      marked?.classList.remove("pointed");
    };
  }, [pointed, tokens, kind]);
  const indexOf = (event) => {
    const found = Array.prototype.indexOf.call(place.current.children, event.target.closest("span"));
    return found >= 0 ? found : null;
  };
  const move = (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20 }[event.key];
    if (event.key === "Escape") pointed.value = null;
    if (!step) return;
    event.preventDefault();
    pointed.value = Math.min(Math.max((pointed.value ?? -1) + step, 0), tokens.length - 1);
    place.current.children[pointed.value]?.scrollIntoView({ block: "nearest" });
  };
  const spans = useMemo(
    () =>
      tokens.map(
        (token, i) => html`<span key=${i} class=${kind?.(token, i) || null} style=${style?.(token, i)}>${visible(text(token, i))}</span>`,
      ),
    [tokens, text, kind, style],
  );
  return html`<p
    class="tokens"
    ref=${place}
    role="group"
    aria-label=${label}
    tabindex="0"
    onPointerOver=${(event) => {
      const index = indexOf(event);
      if (index !== null) pointed.value = index;
    }}
    onPointerLeave=${() => (pointed.value = null)}
    onClick=${(event) => onPick?.(indexOf(event))}
    onKeyDown=${move}
  >${spans}</p>`;
}
