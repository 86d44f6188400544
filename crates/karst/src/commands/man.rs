//! `man`: the manual pages, and the reference of the command line, both made of the tree of commands.

use std::path::PathBuf;

use crate::{
    context::at,
    error::{Error, Result},
};

/// Options of `man`.
#[derive(Debug, clap::Args)]
pub struct Man {
    /// Directory to write the pages into, such as /usr/share/man/man1
    directory: PathBuf,
}

impl Man {
    /// Writes a page for each command.
    pub fn run(self, command: clap::Command) -> Result<()> {
        std::fs::create_dir_all(&self.directory).map_err(|error| at(&self.directory, &error))?;
        clap_mangen::generate_to(command, &self.directory)
            .map_err(|error| Error::Local(format!("{}: {error}", self.directory.display())))
    }
}

/// The reference as Markdown: each command that does something, its arguments and options.
#[cfg(test)]
pub fn reference(mut command: clap::Command) -> String {
    let mut out = String::from(
        "# The command line\n\nMade of `crates/karst` by its test `the_reference_is_current` (`KARST_BLESS=1` writes it). Global options: \
         `--dir DIR` (`KARST_DIR`), `--project NAME` (`KARST_PROJECT`), `--quiet`. Lists take `--format table|compact|csv|json|yaml`. \
         Exit codes: 0; 1 when the server or the host refuses, with one line that says why; 2 for a wrong command line; that of the \
         program for `exec`.\n",
    );
    command.build();
    for child in command.get_subcommands() {
        describe(child, "karst", &mut out);
    }
    out
}

#[cfg(test)]
fn describe(command: &clap::Command, above: &str, out: &mut String) {
    use std::fmt::Write;
    if command.get_name() == "help" {
        return;
    }
    let name = format!("{above} {}", command.get_name());
    if command.has_subcommands() {
        for child in command.get_subcommands() {
            describe(child, &name, out);
        }
        return;
    }
    let own =
        || command.get_arguments().filter(|a| !a.is_global_set() && a.get_id() != "help" && !a.is_hide_set());
    let positional: Vec<String> = own().filter(|a| a.is_positional()).map(ToString::to_string).collect();
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    let _ = writeln!(out, "\n## `{}`\n{about}.\n", [vec![name], positional].concat().join(" "));
    for argument in own() {
        let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
        let short = argument.get_short().map(|c| format!("-{c}, ")).unwrap_or_default();
        let _ = writeln!(out, "- `{short}{argument}` {help}");
    }
}
