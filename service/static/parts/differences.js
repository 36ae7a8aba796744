/** What of a config differs from the reference run: all that is worth reading in a list. */
import { useEffect, useState } from "preact/hooks";
import { changed, knobs } from "../schema.js";

/** A function config -> knobs that differ; it finds none until the defaults are known. */
export function useDifferences() {
  const [known, know] = useState(null);
  useEffect(() => {
    // After the list itself, which without the defaults is only less telling; it asks again when it is shown the next time.
    const ask = setTimeout(() => knobs().then(know, () => {}), 0);
    return () => clearTimeout(ask);
  }, []);
  return (config) => (known ? changed(config, known) : {});
}
