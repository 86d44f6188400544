//! What a row of the table of configuration keys is ([`crate::keys`]).

/// Type of a key's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyType {
    /// Any text.
    Text,
    /// `true` or `false` (also `1/0`, `yes/no`, `on/off`).
    Bool,
    /// A whole number within bounds.
    Integer(i64, i64),
    /// A size, such as `512MiB`.
    Size,
    /// A size, or a share of the host's such as `50%`.
    Memory,
    /// CPUs: a number, or a set such as `0-1,3`.
    Cpus,
    /// NUMA nodes: a set such as `0` or `0-1,3`.
    Nodes,
    /// `50%` or `25ms/100ms`.
    Allowance,
    /// `true`, `false` or a size.
    Swap,
    /// `1024`, `1024:4096`, `unlimited`.
    KernelLimit,
    /// When something is done: a line of cron, or `@daily`.
    Schedule,
    /// A time, such as `2w 3d`.
    Span,
    /// Names of snapshots, such as `snap%d`.
    Pattern,
    /// One of the words.
    OneOf(&'static [&'static str]),
}

/// Which instances have a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyScope {
    /// Both kinds.
    Any,
    /// Containers only.
    Container,
    /// Virtual machines only.
    VirtualMachine,
}

/// A row of the table.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    /// Name, or a prefix ending in `.*`.
    pub name: &'static str,
    /// Type.
    pub kind: KeyType,
    /// Who has it.
    pub scope: KeyScope,
    /// Default in words or as value.
    pub default: &'static str,
    /// Takes effect on a running guest.
    pub live: bool,
    /// Documentation.
    pub text: &'static str,
}

/// A row.
pub(crate) const fn key(
    name: &'static str,
    kind: KeyType,
    scope: KeyScope,
    default: &'static str,
    live: bool,
    text: &'static str,
) -> Key {
    Key { name, kind, scope, default, live, text }
}
