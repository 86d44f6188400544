//! `operation`: what goes on in the server.

use serde_json::Value;

use super::completion::complete;
use crate::{
    client::{About, Kind, Operation as Work, Url, operation::for_each},
    context::Context,
    error::Result,
    output::{
        self, member,
        table::{FormatOption, List},
        units, yes_no,
    },
};

/// `operation ...`
#[derive(Debug, clap::Subcommand)]
pub enum Operation {
    /// List operations
    #[command(visible_alias = "ls")]
    List {
        #[command(flatten)]
        format: FormatOption,
        /// Of all projects
        #[arg(long)]
        all_projects: bool,
    },
    /// Show an operation as YAML
    Show {
        /// Its id
        #[arg(add = complete(Kind::Operation))]
        id: String,
    },
    /// Cancel operations
    #[command(visible_aliases = ["cancel", "rm"])]
    Delete {
        /// Their ids
        #[arg(required = true, add = complete(Kind::Operation))]
        ids: Vec<String>,
    },
    /// Wait until an operation has ended; fails if it failed
    Wait {
        /// Its id
        #[arg(add = complete(Kind::Operation))]
        id: String,
    },
}

impl Operation {
    /// Runs it.
    pub async fn run(self, context: &Context) -> Result<()> {
        let client = &context.client;
        let path = |id: &str| Url::new(&["operations", id]);
        match self {
            Self::List { format, all_projects } => {
                let mut url = Url::new(&["operations"]).with("recursion", 1);
                if all_projects {
                    url = url.with("all-projects", true);
                }
                list(client.get(&url).await?.metadata).print(format.format)
            }
            Self::Show { id } => {
                let answer = client.get(&path(&id)).await.about(client, Kind::Operation, &id)?;
                output::print(&output::to_yaml(&answer.metadata)?)
            }
            Self::Delete { ids } => {
                for_each(&ids, |id| async move {
                    client.delete(&path(&id)).await.about(client, Kind::Operation, &id).map(drop)
                })
                .await
            }
            Self::Wait { id } => {
                let operation = Work { id: id.clone(), ..Work::default() };
                let ended = client.wait(operation, &context.progress(format!("waiting for {id}"))).await;
                ended.about(client, Kind::Operation, &id).map(drop)
            }
        }
    }
}

/// The server groups operations by status; here they are one list, the oldest first.
fn list(groups: Value) -> List {
    let mut operations: Vec<Value> = match groups {
        Value::Object(groups) => {
            groups.into_iter().filter_map(|(_, list)| list.as_array().cloned()).flatten().collect()
        }
        Value::Array(list) => list,
        _ => Vec::new(),
    };
    operations.sort_by_key(|operation| member(operation, "created_at"));
    let columns = &["ID", "TYPE", "DESCRIPTION", "STATUS", "CANCELABLE", "CREATED"];
    List::of(columns, Value::Array(operations), |operation| {
        vec![
            member(operation, "id"),
            member(operation, "class").to_uppercase(),
            member(operation, "description"),
            member(operation, "status").to_uppercase(),
            yes_no(operation["may_cancel"].as_bool().unwrap_or_default()),
            units::time(&member(operation, "created_at")),
        ]
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn groups_become_one_list() {
        let groups = json!({
            "running": [{"id": "b", "class": "task", "status": "Running", "may_cancel": true, "created_at": "2"}],
            "success": [{"id": "a", "class": "websocket", "status": "Success", "created_at": "1"}],
            "failure": null,
        });
        let text = list(groups).render("csv".parse().unwrap()).unwrap();
        assert_eq!(text, "a,WEBSOCKET,,SUCCESS,NO,\nb,TASK,,RUNNING,YES,\n");
        assert_eq!(list(json!({})).render("json".parse().unwrap()).unwrap(), "[]\n");
    }
}
