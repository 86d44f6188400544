//! `snapshot`: of instances.

use serde_json::{Value, json};

use super::{completion::complete, lifecycle::instance_url};
use crate::{
    client::{About, Kind, Url, operation::for_each},
    context::Context,
    error::Result,
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
        name: String,
    },
    /// Put an instance back to a snapshot
    Restore {
        /// Instance
        #[arg(add = complete(Kind::Instance))]
        instance: String,
        /// Snapshot
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
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Rename a snapshot
    Rename {
        /// Instance
        #[arg(add = complete(Kind::Instance))]
        instance: String,
        /// Snapshot
        name: String,
        /// Its new name
        new_name: String,
    },
}

impl Snapshot {
    /// Runs it.
    pub async fn run(self, context: &Context) -> Result<()> {
        let client = &context.client;
        match self {
            Self::Create { instance, name, stateful, quiesce } => {
                let mut body = json!({"stateful": stateful});
                if let Some(quiesce) = &quiesce {
                    body["quiesce"] = json!(quiesce);
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
