//! `warning`.

use serde_json::{Value, json};

use super::completion::complete;
use crate::{
    client::{About, Kind, Url, operation::for_each},
    context::Context,
    error::{Error, Result},
    output::{
        self, member,
        table::{FormatOption, List},
        units,
    },
};

/// `warning ...`
#[derive(Debug, clap::Subcommand)]
pub enum Warning {
    /// List warnings
    #[command(visible_alias = "ls")]
    List {
        #[command(flatten)]
        format: FormatOption,
        /// Also acknowledged and resolved ones
        #[arg(short, long)]
        all: bool,
    },
    /// Show a warning as YAML
    Show {
        /// Its id
        #[arg(add = complete(Kind::Warning))]
        id: String,
    },
    /// Acknowledge warnings: seen, not to be listed again
    #[command(visible_alias = "acknowledge")]
    Ack {
        /// Their ids
        #[arg(required = true, add = complete(Kind::Warning))]
        ids: Vec<String>,
    },
    /// Delete warnings
    #[command(visible_alias = "rm")]
    Delete {
        /// Their ids
        #[arg(add = complete(Kind::Warning), conflicts_with = "all")]
        ids: Vec<String>,
        /// All of them
        #[arg(short, long)]
        all: bool,
    },
}

impl Warning {
    /// Runs it.
    pub async fn run(self, context: &Context) -> Result<()> {
        let client = &context.client;
        let path = |id: &str| Url::new(&["warnings", id]);
        let fetch = async || client.get_as::<Vec<Value>>(&Url::new(&["warnings"]).with("recursion", 1)).await;
        match self {
            Self::List { format, all } => {
                let mut warnings = fetch().await?;
                warnings.retain(|warning| all || member(warning, "status") == "new");
                list(warnings).print(format.format)
            }
            Self::Show { id } => {
                let answer = client.get(&path(&id)).await.about(client, Kind::Warning, &id)?;
                output::print(&output::to_yaml(&answer.metadata)?)
            }
            Self::Ack { ids } => {
                for_each(&ids, |id| async move {
                    let body = json!({"status": "acknowledged"});
                    let answer = client.change(hyper::Method::PATCH, &path(&id), &body, None).await;
                    answer.about(client, Kind::Warning, &id).map(drop)
                })
                .await
            }
            Self::Delete { ids, all } => {
                let ids = if all {
                    fetch().await?.iter().map(|warning| member(warning, "uuid")).collect()
                } else {
                    ids
                };
                if ids.is_empty() && !all {
                    return Err(Error::Usage(
                        "name warnings, or --all (karst warning list shows them)".to_owned(),
                    ));
                }
                for_each(&ids, |id| async move {
                    client.delete(&path(&id)).await.about(client, Kind::Warning, &id).map(drop)
                })
                .await
            }
        }
    }
}

fn list(mut warnings: Vec<Value>) -> List {
    warnings.sort_by_key(|warning| std::cmp::Reverse(member(warning, "last_seen_at")));
    let columns = &["UUID", "TYPE", "STATUS", "SEVERITY", "COUNT", "PROJECT", "LAST SEEN", "MESSAGE"];
    List::of(columns, Value::Array(warnings), |warning| {
        vec![
            member(warning, "uuid"),
            member(warning, "type"),
            member(warning, "status").to_uppercase(),
            member(warning, "severity").to_uppercase(),
            member(warning, "count"),
            member(warning, "project"),
            units::time(&member(warning, "last_seen_at")),
            crate::error::one_line(&member(warning, "last_message")),
        ]
    })
}
