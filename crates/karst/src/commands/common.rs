//! The subcommands that all families of named objects share.

use super::{
    completion::complete_named,
    object::{Object, parse_settings},
};
use crate::{client::operation::for_each, context::Context, error::Result};

/// What all families can do with one of their objects.
#[derive(Debug, clap::Subcommand)]
pub enum Common {
    /// Show it as YAML
    Show {
        /// Its name
        #[arg(add = complete_named())]
        name: String,
    },
    /// Print the value of a key
    Get {
        /// Its name
        #[arg(add = complete_named())]
        name: String,
        /// Key
        key: String,
        /// A property of the object itself, such as description
        #[arg(short, long)]
        property: bool,
    },
    /// Set keys
    Set {
        /// Its name
        #[arg(add = complete_named())]
        name: String,
        /// Keys; the value "-" is read from stdin
        #[arg(required = true, value_name = "KEY=VALUE")]
        keys: Vec<String>,
        /// Properties of the object itself, such as description
        #[arg(short, long)]
        property: bool,
    },
    /// Remove a key
    Unset {
        /// Its name
        #[arg(add = complete_named())]
        name: String,
        /// Key
        key: String,
        /// A property of the object itself
        #[arg(short, long)]
        property: bool,
    },
    /// Change it in an editor, or replace it by YAML on stdin
    Edit {
        /// Its name
        #[arg(add = complete_named())]
        name: String,
    },
    /// Delete
    #[command(visible_alias = "rm")]
    Delete {
        /// Names
        #[arg(required = true, add = complete_named())]
        names: Vec<String>,
    },
    /// Rename
    Rename {
        /// Its name
        #[arg(add = complete_named())]
        name: String,
        /// Its new name
        new_name: String,
    },
}

impl Common {
    /// Runs it; `find` makes an object of a name.
    pub async fn run(self, context: &Context, find: impl Fn(&str) -> Object) -> Result<()> {
        match self {
            Self::Show { name } => find(&name).show(context).await,
            Self::Get { name, key, property } => find(&name).print_key(context, &key, property).await,
            Self::Set { name, keys, property } => {
                find(&name).set(context, parse_settings(&keys)?, property).await
            }
            Self::Unset { name, key, property } => find(&name).unset(context, &key, property).await,
            Self::Edit { name } => find(&name).edit(context).await,
            Self::Delete { names } => {
                for_each(&names, |name| {
                    let object = find(&name);
                    async move { object.delete(context).await }
                })
                .await
            }
            Self::Rename { name, new_name } => find(&name).rename(context, &new_name).await,
        }
    }
}
