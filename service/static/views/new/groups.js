/** The order in which the form shows the knobs. What a knob is stands in the API's document alone; a test compares the names. */

export const GROUPS = [
  { name: "most", open: true, knobs: ["epochs", "lr", "dropout", "n_layer", "n_head", "n_embd", "block_size", "seed"] },
  {
    name: "mixture",
    knobs: [
      "use_moe", "n_experts", "k", "moe_stride", "capacity_factor", "router_aux_loss_coef", "router_z_loss_coef", "expert_hidden_ratio",
      "n_shared_experts", "norm_topk_prob", "router_score", "router_noise", "router_bias_update_rate", "upcycle_noise",
    ],
  },
  { name: "model", knobs: ["tokenizer", "bias", "init_from"] },
  {
    name: "optimizer",
    knobs: ["lr_schedule", "warmup_steps", "min_lr", "weight_decay", "betas", "eps", "grad_clip", "batch_size", "gradient_accumulation_steps", "max_steps"],
  },
  {
    name: "stopping",
    knobs: ["stop_at_perplexity", "val_fraction", "early_stopping_patience", "early_stopping_min_delta", "eval_interval", "eval_max_tokens"],
  },
  { name: "sampling", knobs: ["cont_prefix_tokens", "cont_max_new_tokens", "temperature", "top_k"] },
  { name: "execution", knobs: ["precision", "deterministic"] },
];

/** What says nothing as long as the model is dense. */
export const WITH_MIXTURE = GROUPS.find(({ name }) => name === "mixture").knobs.filter((knob) => knob !== "use_moe");
