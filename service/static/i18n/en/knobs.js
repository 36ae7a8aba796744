/** English: the knobs' meanings are the API's own words. */
export default {};
