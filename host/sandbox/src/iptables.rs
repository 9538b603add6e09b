//! The guest's packet filter, by the tools of its image.

use coracle_protocol::agent::{GetIPTablesRequest, SetIPTablesRequest};

use crate::agent::Patience;
use crate::{Result, Sandbox};

impl Sandbox {
    /// All rules, in the form of iptables-save(8).
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] where the guest image has no such tools.
    pub async fn iptables(&self, is_ipv6: bool) -> Result<Vec<u8>> {
        let pod = self.ask(|state| state.up()).await??;
        let request = GetIPTablesRequest { is_ipv6, ..Default::default() };
        let get = pod
            .agent
            .call("GetIPTables", Patience::Bounded, async |agent, ctx| agent.get_ip_tables(ctx, &request).await);
        Ok(get.await?.data)
    }

    /// Replaces the rules, by the same form.
    ///
    /// # Errors
    /// As [`Self::iptables`], and what the tool says.
    pub async fn set_iptables(&self, is_ipv6: bool, rules: Vec<u8>) -> Result<()> {
        let pod = self.ask(|state| state.up()).await??;
        let request = SetIPTablesRequest { is_ipv6, data: rules, ..Default::default() };
        let set = pod
            .agent
            .call("SetIPTables", Patience::Bounded, async |agent, ctx| agent.set_ip_tables(ctx, &request).await);
        set.await.map(drop)
    }
}
