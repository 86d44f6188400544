//! `snapshot`: of instances.

use serde_json::{Value, json};

use super::{
    completion::{Below, complete, complete_below},
    expiry,
    lifecycle::instance_url,
    object::{Object, parse_settings},
};
use crate::{
    client::{About, Kind, Url, operation::for_each},
    context::Context,
    error::{Error, Result},
    output::{
        self, member,
        table::{FormatOption, List},
        units, yes_no,
    },
};

/// `snapshot ...`
#[derive(Debug, clap::Subcommand)]
pub enum Snapshot {
    /// Make a snapshot
    Create {
        /// Instance
        #[arg(add = complete(Kind::Instance))]
        instance: String,
        /// Name; the server chooses one otherwise
        name: Option<String>,
        /// With the memory of the running instance
        #[arg(long)]
        stateful: bool,
        /// Make the file systems inside the virtual machine still: require, try or no (default: what snapshots.quiesce says)
        #[arg(long, value_name = "HOW", num_args = 0..=1, require_equals = true, default_missing_value = "require",
              value_parser = ["no", "try", "require"])]
        quiesce: Option<String>,
        /// When it goes by itself: a time (RFC 3339), a span such as 12h or 7d, or never (default: what snapshots.expiry says)
        #[arg(long, value_name = "WHEN", value_parser = expiry::parse)]
        expires: Option<String>,
    },
    /// List the snapshots of an instance
    #[command(visible_alias = "ls")]
    List {
        /// Instance
        #[arg(add = complete(Kind::Instance))]
        instance: String,
        #[command(flatten)]
        format: FormatOption,
    },
    /// Show a snapshot as YAML
    Show {
        /// Instance
        #[arg(add = complete(Kind::Instance))]
        instance: String,
        /// Snapshot
        #[arg(add = complete_below(Below::Snapshot))]
        name: String,
    },
    /// Set what can change: expires_at (a time, a span such as 7d, or never)
    Set {
        /// Instance
        #[arg(add = complete(Kind::Instance))]
        instance: String,
        /// Snapshot
        #[arg(add = complete_below(Below::Snapshot))]
        name: String,
        /// Properties
        #[arg(required = true, value_name = "KEY=VALUE")]
        keys: Vec<String>,
    },
    /// Change a snapshot in an editor, or replace what can change by YAML on stdin
    Edit {
        /// Instance
        #[arg(add = complete(Kind::Instance))]
        instance: String,
        /// Snapshot
        #[arg(add = complete_below(Below::Snapshot))]
        name: String,
    },
    /// Put an instance back to a snapshot
    Restore {
        /// Instance
        #[arg(add = complete(Kind::Instance))]
        instance: String,
        /// Snapshot
        #[arg(add = complete_below(Below::Snapshot))]
        name: String,
        /// With the memory
        #[arg(long)]
        stateful: bool,
    },
    /// Delete snapshots
    #[command(visible_alias = "rm")]
    Delete {
        /// Instance
        #[arg(add = complete(Kind::Instance))]
        instance: String,
        /// Snapshots
        #[arg(required = true, add = complete_below(Below::Snapshot))]
        names: Vec<String>,
    },
    /// Rename a snapshot
    Rename {
        /// Instance
        #[arg(add = complete(Kind::Instance))]
        instance: String,
        /// Snapshot
        #[arg(add = complete_below(Below::Snapshot))]
        name: String,
        /// Its new name
        new_name: String,
    },
}

/// A snapshot as an object with fields.
fn object(instance: &str, name: &str) -> Object {
    let full = format!("{instance}/{name}");
    Object { url: instance_url(&full), kind: Kind::Snapshot, name: full, fields: &["expires_at"] }
}

/// Properties of a snapshot as people say them.
pub fn properties(mut pairs: Vec<(String, String)>) -> Result<Vec<(String, String)>> {
    for (key, value) in &mut pairs {
        if key == "expires_at" {
            *value = expiry::parse(value).map_err(|text| Error::Usage(format!("expires_at: {text}")))?;
        }
    }
    Ok(pairs)
}

impl Snapshot {
    /// Runs it.
    pub async fn run(self, context: &Context) -> Result<()> {
        let client = &context.client;
        match self {
            Self::Create { instance, name, stateful, quiesce, expires } => {
                let mut body = json!({"stateful": stateful});
                if let Some(quiesce) = &quiesce {
                    body["quiesce"] = json!(quiesce);
                }
                if let Some(expires) = &expires {
                    body["expires_at"] = json!(expires);
                }
                if let Some(name) = &name {
                    body["name"] = json!(name);
                }
                let work = async {
                    let answer =
                        client.post(&Url::new(&["instances", &instance, "snapshots"]), &body).await?;
                    context.finish(answer, format!("snapshot of {instance}")).await
                };
                let done = work.await.about(client, Kind::Instance, &instance)?;
                let warnings = done.map(|operation| operation.metadata["warnings"].clone());
                for warning in warnings.iter().filter_map(Value::as_array).flatten().filter_map(Value::as_str)
                {
                    eprintln!("Warning: {warning}");
                }
                Ok(())
            }
            Self::List { instance, format } => {
                let url = Url::new(&["instances", &instance, "snapshots"]).with("recursion", 1);
                let objects = client.get(&url).await.about(client, Kind::Instance, &instance)?.metadata;
                let list = List::of(&["NAME", "TAKEN AT", "EXPIRES AT", "STATEFUL"], objects, |snapshot| {
                    vec![
                        member(snapshot, "name"),
                        units::time(&member(snapshot, "created_at")),
                        units::time(&member(snapshot, "expires_at")),
                        yes_no(snapshot["stateful"].as_bool().unwrap_or_default()),
                    ]
                });
                list.print(format.format)
            }
            Self::Show { instance, name } => {
                let full = format!("{instance}/{name}");
                let answer = client.get(&instance_url(&full)).await.about(client, Kind::Instance, &full)?;
                output::print(&output::to_yaml(&answer.metadata)?)
            }
            Self::Set { instance, name, keys } => {
                let pairs = properties(parse_settings(&keys)?)?;
                object(&instance, &name).set(context, pairs, true).await
            }
            Self::Edit { instance, name } => object(&instance, &name).edit(context).await,
            Self::Restore { instance, name, stateful } => {
                let body = json!({"restore": name, "stateful": stateful});
                let work = async {
                    let answer =
                        client.change(hyper::Method::PUT, &instance_url(&instance), &body, None).await?;
                    context.finish(answer, format!("restoring {instance}")).await
                };
                work.await.about(client, Kind::Instance, &instance).map(drop)
            }
            Self::Delete { instance, names } => {
                for_each(&names, |name| {
                    let full = format!("{instance}/{name}");
                    async move {
                        let work = async {
                            let answer = client.delete(&instance_url(&full)).await?;
                            context.finish(answer, format!("deleting {full}")).await
                        };
                        work.await.about(client, Kind::Instance, &full).map(drop)
                    }
                })
                .await
            }
            Self::Rename { instance, name, new_name } => {
                let full = format!("{instance}/{name}");
                let body: Value = json!({"name": new_name});
                let work = async {
                    let answer = client.post(&instance_url(&full), &body).await?;
                    context.finish(answer, format!("renaming {full}")).await
                };
                work.await.about(client, Kind::Instance, &full).map(drop)
            }
        }
    }
}
